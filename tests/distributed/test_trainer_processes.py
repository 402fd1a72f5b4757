"""The Trainer in two processes: the stock one without extrapolation, virtual workers with it, resumes, units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.trainer_processes import COMMON, EQUIVALENT, MEASURED, SAVING
from tests.support.tiny_trainer import marian, train, weights

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ranks(folder: Path, launch_here: Callable[..., Any]) -> list[dict[str, Any]]:
    """What the two processes saw."""
    train(folder / "alone", extrap="extrap-past", max_steps=3, **COMMON, **SAVING)
    return launch_here("trainer_processes.py", folder, folder / "alone" / "checkpoint-3", left="rank")


def test_replicas_end_bit_identical(ranks: list[dict[str, Any]]) -> None:
    names = [name for name, value in ranks[0].items() if isinstance(value, torch.Tensor)]
    assert len(names) > 20
    for name in names:
        assert torch.equal(ranks[0][name], ranks[1][name]), name


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("preset", EQUIVALENT)
def test_two_processes_are_two_virtual_workers(
    ranks: list[dict[str, Any]], tmp_path: Path, preset: str, steps: int
) -> None:
    alone = train(tmp_path, extrap=preset, extrap_virtual_workers=2 * steps, **COMMON)
    torch.testing.assert_close(weights(alone), ranks[0][f"{preset} {steps}"], rtol=1e-4, atol=1e-6)
    rows = zip(alone.state.log_history, ranks[0][f"{preset} {steps} logs"], strict=False)
    for row, other in rows:
        for name in ("loss", "extrap/displacement_norm", "extrap/step_size", "extrap/gradient_noise_scale"):
            assert other[name] == pytest.approx(row[name], rel=1e-2, abs=1e-9), name


def test_an_evaluation_before_training_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    """The stock Trainer does not wrap a model for DDP that it has evaluated."""
    assert torch.equal(ranks[0]["evaluated first"], ranks[0]["extrap-past 1"])


@pytest.mark.parametrize("preset", ["extrap", "extragradient"])
def test_evaluations_between_steps_change_nothing(ranks: list[dict[str, Any]], preset: str) -> None:
    assert torch.equal(ranks[0][f"{preset} with evaluations"], ranks[0][f"{preset} 1"])


def test_none_is_the_stock_trainer_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["none"], ranks[0]["stock"])


@pytest.mark.parametrize("extrap", ["none", "extrap-past"])
def test_neither_accumulation_nor_world_size_scales_the_gradient(
    ranks: list[dict[str, Any]], tmp_path: Path, extrap: str
) -> None:
    fields = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential", "max_steps": 1}
    alone = train(tmp_path, model=marian(), extrap=extrap, **fields)
    norm = alone.state.log_history[0]["grad_norm"]
    assert ranks[0][f"gradient norm {extrap}"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("preset", ["extrap-past", "smoothout"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    ranks: list[dict[str, Any]], folder: Path, preset: str
) -> None:
    assert torch.equal(ranks[0][f"{preset} resumed"], ranks[0][f"{preset} whole"])
    assert ranks[0][f"{preset} resumed losses"] == ranks[0][f"{preset} whole losses"]
    assert torch.equal(ranks[0][f"{preset} finished"], ranks[0][f"{preset} whole"])
    assert ranks[0][f"{preset} finished steps"] == 6
    files = sorted(path.name for path in (folder / preset / "checkpoint-3").glob("extrap_rank_*"))
    assert files == ["extrap_rank_0.safetensors", "extrap_rank_1.safetensors"]


def test_a_checkpoint_is_complete_when_every_process_has_saved(ranks: list[dict[str, Any]]) -> None:
    assert not ranks[1]["complete too early"]
    assert ["checkpoint-3 lacks extrap_rank_1.safetensors" in rank["torn"] for rank in ranks] == [True, True]


def test_another_world_size_warns_and_starts_cold(
    ranks: list[dict[str, Any]], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ranks[0]["grown steps"] == 6
    assert any("world_size was 1 and is 2" in text for text in ranks[0]["warnings"])
    fields = {"extrap": "extrap-past", "extrap_virtual_workers": 2, **COMMON, **SAVING}
    shrunk = train(tmp_path, resume=str(folder / "extrap-past" / "checkpoint-3"), **fields)
    assert shrunk.state.global_step == 6
    assert "the checkpoint has 2 processes and this run 1" in caplog.text


def test_sharpness_is_that_of_the_mean_over_processes(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = train(tmp_path, extrap_virtual_workers=2, sharpness_batches=2, **MEASURED, **COMMON)
    expected = [row["extrap/sharpness"] for row in alone.state.log_history if "extrap/sharpness" in row]
    assert len(expected) == 2
    assert ranks[0]["sharpness"] == ranks[1]["sharpness"] == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(weights(alone), ranks[0]["measured"], rtol=1e-4, atol=1e-6)
