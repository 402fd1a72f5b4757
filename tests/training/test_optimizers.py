"""Base optimizers by name, learning-rate scaling, warm-up and step decay, by themselves and in the Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_extrap.training.model_card import optimizer_name
from hf_extrap.training.optimizers import base_optimizer, parse_arguments, scaled_learning_rate_factor, step_decay
from tests.support.tiny_trainer import arguments, train

STOCK = "adamw_torch_fused"


def stepped(folder: Path, name: str, values: list[Any], grads: list[Any], decay: float, **fields: Any) -> list[Any]:
    args = arguments(folder, base_optimizer=name, optim=STOCK, learning_rate=0.1, **fields)
    params = [torch.nn.Parameter(torch.tensor(value)) for value in values]
    kind, kwargs = base_optimizer(args, name)
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.tensor(g)
    kind(params, **kwargs, weight_decay=decay).step()
    return [p.detach() for p in params]


def test_lars_and_lamb_scale_by_norms(tmp_path: Path) -> None:
    given = {"optim_args": "momentum=0.9,trust_coefficient=0.02"}
    values, grads = [[[3.0, 4.0]], [3.0, 4.0]], [[[0.0, 2.0]], [0.0, 2.0]]
    matrix, vector = stepped(tmp_path, "lars", values, grads, 0.1, **given)
    # 0.02 · 5 / (2 + 0.1 · 5) = 0.04, times g + 0.1 w = (0.3, 2.4).
    assert torch.allclose(matrix, torch.tensor([[3 - 0.1 * 0.04 * 0.3, 4 - 0.1 * 0.04 * 2.4]]), atol=1e-7)
    assert torch.allclose(vector, torch.tensor([3.0, 3.8]))
    matrix, vector = stepped(tmp_path, "lamb", [[[3.0, 4.0]], [6.0, 8.0]], [[[0.0, 2.0]], [5.0, 0.0]], 0.0)
    assert torch.allclose(matrix, torch.tensor([[3.0, 4 - 0.1 * 5]]), atol=1e-5)
    assert torch.allclose(vector, torch.tensor([6 - 0.1 * 10, 8.0]), atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "lars", "lamb", "nadam"])
def test_the_trainer_takes_it_with_its_weight_decay(tmp_path: Path, name: str) -> None:
    fields = {"sgd_momentum": 0.9, "sgd_nesterov": True} if name == "sgd" else {"base_optimizer": name, "optim": STOCK}
    trainer = train(tmp_path, weight_decay=0.1, max_steps=1, **fields)
    assert optimizer_name(trainer.optimizer).lower() == name
    assert sorted(group["weight_decay"] for group in trainer.optimizer.param_groups) == [0.0, 0.1]
    if name == "sgd":
        group = trainer.optimizer.param_groups[0]
        assert (group["momentum"], group["nesterov"]) == (0.9, True)


def test_scaling_rules_step_decay_and_arguments(tmp_path: Path) -> None:
    for rule, factor in (("none", 1.0), ("linear", 8.0), ("sqrt", math.sqrt(8))):
        assert scaled_learning_rate_factor(rule, 256, 32) == pytest.approx(factor)
    given = "betas=(0.9, 0.98),nesterov=true,eps=1e-8"
    assert parse_arguments(given) == {"betas": (0.9, 0.98), "nesterov": True, "eps": 1e-8}
    rate = step_decay(100, 10, [0.5, 0.75], 0.1)
    expected = {0: 0, 5: 0.5, 10: 1, 49: 1, 50: 0.1, 74: 0.1, 75: 0.01, 100: 0.01}
    assert {step: rate(step) for step in expected} == pytest.approx(expected)
    kind, kwargs = base_optimizer(arguments(tmp_path, adam_beta2=0.98, adam_epsilon=1e-9), "nadam")
    assert kind is torch.optim.NAdam
    assert (kwargs["betas"], kwargs["eps"], kwargs["decoupled_weight_decay"]) == ((0.9, 0.98), 1e-9, True)


def test_learning_rates_of_the_trainer(tmp_path: Path) -> None:
    fields = {"extrap_virtual_workers": 2, "lr_scaling": "linear", "base_batch_size": 2, "max_steps": 8}
    trainer = train(tmp_path, learning_rate=0.01, lr_milestones=[0.5], warmup_steps=2, **fields)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    # 2 workers × 4 rows are 4 times the base batch.
    assert rates == pytest.approx([0.0, 0.02, 0.04, 0.04, 0.004, 0.004, 0.004, 0.004])
    fields = {"max_steps": -1, "num_train_epochs": 4, "per_device_train_batch_size": 16}
    trainer = train(tmp_path, warmup_epochs=2, lr_scheduler_type="constant_with_warmup", learning_rate=0.08, **fields)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates == pytest.approx([0.01 * step for step in range(8)] + [0.08] * 8)
