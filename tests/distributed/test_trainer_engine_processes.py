"""The Trainer under DeepSpeed and FSDP2 in two processes: virtual workers in one, resumes to the bit, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


from tests.distributed.trainer_engine_processes import COMMON, PRESETS, RESUMED
from tests.support.tiny_trainer import train, weights

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module", params=PRESETS)
def ranks(request: pytest.FixtureRequest, folder: Path, launch_here: Callable[..., Any]) -> list[dict[str, Any]]:
    """What the two processes saw under one engine."""
    engine = request.param
    seen = launch_here("trainer_engine_processes.py", folder / engine, engine, left=engine)
    return [{**rank, "engine": engine} for rank in seen]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, tuple[torch.Tensor, list[dict[str, Any]]]]:
    """One process that plays both workers."""
    found = {}
    for preset in dict.fromkeys(preset for presets in PRESETS.values() for preset in presets):
        for steps in (1, 2):
            trainer = train(folder / "alone", extrap=preset, extrap_virtual_workers=2 * steps, **COMMON)
            rows = [row for row in trainer.state.log_history if "loss" in row]
            found[f"{preset} {steps}"] = (weights(trainer).clone(), rows)
    return found


def test_replicas_end_bit_identical(ranks: list[dict[str, Any]]) -> None:
    names = [name for name, value in ranks[0].items() if isinstance(value, torch.Tensor)]
    assert len(names) > 10
    for name in names:
        assert torch.equal(ranks[0][name], ranks[1][name]), name


def test_two_processes_are_two_virtual_workers(
    ranks: list[dict[str, Any]], alone: dict[str, tuple[torch.Tensor, list[dict[str, Any]]]]
) -> None:
    for preset in PRESETS[ranks[0]["engine"]]:
        for steps in (1, 2):
            name = f"{preset} {steps}"
            expected, rows = alone[name]
            torch.testing.assert_close(
                ranks[0][name], expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )
            logs = ranks[0][f"{name} logs"]
            assert len(logs) == len(rows) == 6
            for row, other in zip(rows, logs, strict=True):
                # Stage 0 in float32 does not tell the Trainer the norm.
                norm = ["grad_norm"] if ranks[0]["engine"] != "zero0" else []
                for key in ("loss", *norm, "extrap/displacement_norm", "extrap/step_size"):
                    if key in row:
                        assert other[key] == pytest.approx(row[key], rel=1e-5, abs=1e-7), (name, key)
                # FSDP2 shows no single pass's gradient, which the noise scale needs.
                scale = ["extrap/gradient_noise_scale"] if ranks[0]["engine"] != "fsdp2" else []
                for key in (*scale, "extrap/direction_cosine"):
                    if key in row:
                        assert other[key] == pytest.approx(row[key], rel=1e-3, abs=1e-5), (name, key)


def test_evaluations_between_steps_change_nothing(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["with evaluations"], ranks[0][f"{RESUMED[ranks[0]['engine']]} 1"])


def test_a_killed_run_resumes_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert torch.equal(rank["resumed"], rank["whole"])
        assert not rank["warnings"]


def test_rank_files_are_kept_and_rotated_with_their_checkpoints(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["checkpoints"] == ["checkpoint-4", "checkpoint-6"]
    assert ranks[0]["files"] == ["extrap_rank_0.safetensors", "extrap_rank_1.safetensors"]


def test_saved_files_hold_x(ranks: list[dict[str, Any]], folder: Path) -> None:
    saved = GPT2LMHeadModel.from_pretrained(folder / ranks[0]["engine"] / "saved")
    assert torch.equal(torch.cat([p.detach().flatten() for p in saved.parameters()]), ranks[0]["resumed"])


def test_what_cannot_be_done_is_refused(ranks: list[dict[str, Any]]) -> None:
    expected = (
        "an optimizer of its own" if ranks[0]["engine"] in ("zero0", "zero2") else "no worker has weights of its own"
    )
    assert expected in ranks[0]["refusal"] and "allowed:" in ranks[0]["refusal"]
