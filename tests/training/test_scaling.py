"""Learning-rate rules, warm-up and step decay, by themselves and in the Trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hf_extrap.training.scaling import scaled_learning_rate_factor, step_decay
from tests.support.tiny_trainer import train


@pytest.mark.parametrize("rule, factor", [("none", 1.0), ("linear", 8.0), ("sqrt", math.sqrt(8))])
def test_rules(rule: str, factor: float) -> None:
    assert scaled_learning_rate_factor(rule, 256, 32) == pytest.approx(factor)


def test_step_decay_warms_up_and_is_cut_at_each_milestone() -> None:
    rate = step_decay(100, 10, [0.5, 0.75], 0.1)
    expected = {0: 0, 5: 0.5, 10: 1, 49: 1, 50: 0.1, 74: 0.1, 75: 0.01, 100: 0.01}
    assert {step: rate(step) for step in expected} == pytest.approx(expected)


def test_the_trainer_scales_to_the_batch_of_all_workers_and_decays(tmp_path: Path) -> None:
    fields = {"extrap_virtual_workers": 2, "lr_scaling": "linear", "base_batch_size": 2, "max_steps": 8}
    trainer = train(tmp_path, learning_rate=0.01, lr_milestones=[0.5], warmup_steps=2, **fields)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    # 2 workers × 4 rows are 4 times the base batch.
    assert rates == pytest.approx([0.0, 0.02, 0.04, 0.04, 0.004, 0.004, 0.004, 0.004])


def test_warm_up_in_epochs(tmp_path: Path) -> None:
    fields = {"max_steps": -1, "num_train_epochs": 4, "per_device_train_batch_size": 16}
    trainer = train(tmp_path, warmup_epochs=2, lr_scheduler_type="constant_with_warmup", learning_rate=0.08, **fields)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates == pytest.approx([0.01 * step for step in range(8)] + [0.08] * 8)


def test_momentum_of_sgd(tmp_path: Path) -> None:
    group = train(tmp_path, sgd_momentum=0.9, sgd_nesterov=True, max_steps=1).optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
