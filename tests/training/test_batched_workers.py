"""`batch_workers` in the Trainer: the same run as with workers one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_extrap import ExtrapTrainer
from hf_extrap.recipes import get_task
from hf_extrap.recipes.image_classification.task import ImageClassificationArguments
from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM
from tests.support.tiny_images import buffers, train_images
from tests.support.tiny_trainer import arguments, gpt2, make, train, weights


def rows(trainer: ExtrapTrainer) -> list[dict[str, float]]:
    """What was logged, without times."""
    return [
        {k: v for k, v in row.items() if "second" not in k and "time" not in k} for row in trainer.state.log_history
    ]


def assert_same_run(one: ExtrapTrainer, other: ExtrapTrainer, tolerance: float) -> None:
    assert float((weights(one) - weights(other)).abs().max()) <= tolerance
    for row, expected in zip(rows(one), rows(other), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("preset", ["none", "extrap", "extrap-past", "optimistic", "past-update", "gaussian"])
def test_a_language_model_trains_as_with_the_loop(tmp_path: Path, preset: str) -> None:
    fields: dict[str, Any] = {
        "extrap": preset,
        "extrap_virtual_workers": 3,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,
    }
    fields |= {"eval_strategy": "steps", "eval_steps": 3}
    looped = train(tmp_path, **fields)
    assert_same_run(train(tmp_path, batch_workers=True, **fields), looped, 1e-5)


def test_fresh_directions_of_other_samples_and_of_a_share(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"extrap": "extrap", "extrap_virtual_workers": 2, "extrap_batch": "independent"}
    fields["extrap_batch_fraction"] = 0.5
    assert_same_run(train(tmp_path, batch_workers=True, **fields), train(tmp_path, **fields), 1e-5)


@pytest.mark.parametrize("preset", ["none", "extrap"])
def test_running_statistics_are_the_first_workers(tmp_path: Path, preset: str) -> None:
    fields: dict[str, Any] = {"extrap": preset, "extrap_virtual_workers": 2, "max_steps": 3}
    batched, looped = (train_images(tmp_path, batch_workers=at_once, **fields) for at_once in (True, False))
    assert_same_run(batched, looped, 1e-5)
    torch.testing.assert_close(buffers(batched.model), buffers(looped.model), rtol=1e-4, atol=1e-5)


def test_the_digits_task(tmp_path: Path) -> None:
    trainers = []
    for at_once in (True, False):
        fields: dict[str, Any] = {"extrap": "extrap-past", "extrap_virtual_workers": 4, "sgd_momentum": 0.9}
        fields |= {"per_device_train_batch_size": 16, "remove_unused_columns": False, "batch_workers": at_once}
        settings = arguments(tmp_path / "out", **fields)
        task = ImageClassificationArguments(dataset="builtin", depth=8, width=4, data_cache_dir=str(tmp_path))
        torch.manual_seed(0)
        prepared = get_task("image_classification").prepare(task, settings)
        trainer = ExtrapTrainer(
            prepared.model, settings, train_dataset=prepared.train_dataset, data_collator=prepared.data_collator
        )
        trainer.train()
        trainers.append(trainer)
    assert_same_run(*trainers, 1e-5)


def test_bfloat16_is_that_of_the_loop(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"extrap": "extrap-past", "extrap_virtual_workers": 2, "bf16": True}
    start = weights(make(tmp_path))
    batched, looped = (weights(train(tmp_path, batch_workers=at_once, **fields)) for at_once in (True, False))
    exact = weights(train(tmp_path, **(fields | {"bf16": False})))
    difference = (batched - looped).norm() / (looped - start).norm()
    assert difference < 2e-2
    assert not torch.equal(looped, exact)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extrap_virtual_workers": 1}, "batch_workers is true and extrap_virtual_workers is 1"),
        ({"carry_state": True}, "carry_state is true"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is true"),
    ],
)
def test_settings_that_cannot_be_batched_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **({"extrap_virtual_workers": 2, "batch_workers": True} | fields))


def test_recurrent_layers_and_batches_of_several_shapes_are_refused(tmp_path: Path) -> None:
    lstm = ExtrapLstmForCausalLM(ExtrapLstmConfig(vocab_size=50, embedding_size=4, hidden_size=4, num_hidden_layers=1))
    with pytest.raises(ValueError, match="ExtrapLstmForCausalLM has the recurrent layer"):
        make(tmp_path, model=lstm, extrap_virtual_workers=2, batch_workers=True)
    # 64 sentences are 12 batches of 5 and one of 4.
    fields: dict[str, Any] = {"per_device_train_batch_size": 5, "max_steps": 8, "extrap_virtual_workers": 13}
    with pytest.raises(ValueError, match="differ in the shape of 'input_ids'"):
        train(tmp_path, model=gpt2(), batch_workers=True, **fields)
