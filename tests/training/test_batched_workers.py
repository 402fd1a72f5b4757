"""`batch_workers` in the Trainer: the same run as with workers one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_extrap import ExtrapTrainer
from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM
from tests.support.tiny_images import buffers, train_images
from tests.support.tiny_trainer import make, train, weights
from tests.training.logged import history


def assert_same_run(one: ExtrapTrainer, other: ExtrapTrainer) -> None:
    """The same parameters, and the same log apart from times, up to rounding."""
    assert float((weights(one) - weights(other)).abs().max()) <= 1e-5
    for row, expected in zip(history(one), history(other), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)


DEFAULT: dict[str, dict[str, Any]] = {preset: {"extrap": preset} for preset in ("none", "extrap-past", "gaussian")}
DEFAULT["independent"] = {"extrap": "extrap", "extrap_batch": "independent", "extrap_batch_fraction": 0.5}


def matrix(*presets: str) -> list[Any]:
    return [pytest.param(preset, marks=pytest.mark.matrix) for preset in presets]


@pytest.mark.parametrize("preset", [*DEFAULT, *matrix("extrap", "optimistic", "past-update")])
def test_a_language_model_trains_as_with_the_loop(tmp_path: Path, preset: str) -> None:
    fields: dict[str, Any] = {"extrap_virtual_workers": 3, "optim": "adamw_torch", "adam_epsilon": 1e-3}
    fields |= {"eval_strategy": "steps", "eval_steps": 3} | DEFAULT.get(preset, {"extrap": preset})
    assert_same_run(train(tmp_path, batch_workers=True, **fields), train(tmp_path, **fields))


@pytest.mark.parametrize("preset", ["extrap", *matrix("none")])
def test_running_statistics_are_the_first_workers(tmp_path: Path, preset: str) -> None:
    fields: dict[str, Any] = {"extrap": preset, "extrap_virtual_workers": 2, "max_steps": 3}
    batched, looped = (train_images(tmp_path, batch_workers=at_once, **fields) for at_once in (True, False))
    assert_same_run(batched, looped)
    torch.testing.assert_close(buffers(batched.model), buffers(looped.model), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_that_of_the_loop(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"extrap": "extrap-past", "extrap_virtual_workers": 2, "bf16": True}
    start = weights(make(tmp_path))
    batched, looped = (weights(train(tmp_path, batch_workers=at_once, **fields)) for at_once in (True, False))
    exact = weights(train(tmp_path, **(fields | {"bf16": False})))
    difference = (batched - looped).norm() / (looped - start).norm()
    assert difference < 2e-2
    assert not torch.equal(looped, exact)


def test_settings_that_cannot_be_batched_are_refused(tmp_path: Path) -> None:
    lstm = ExtrapLstmForCausalLM(ExtrapLstmConfig(vocab_size=50, embedding_size=4, hidden_size=4, num_hidden_layers=1))
    # 64 sentences are 12 batches of 5 and one of 4.
    uneven = {"per_device_train_batch_size": 5, "max_steps": 8, "extrap_virtual_workers": 13}
    for fields, message in (
        ({"extrap_virtual_workers": 1}, "batch_workers is true and extrap_virtual_workers is 1"),
        ({"carry_state": True}, "carry_state is true"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is true"),
        ({"model": lstm}, "ExtrapLstmForCausalLM has the recurrent layer"),
        (uneven, "differ in the shape of 'input_ids'"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, **{"extrap_virtual_workers": 2, "batch_workers": True, **fields})
