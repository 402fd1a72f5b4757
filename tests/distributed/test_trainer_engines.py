"""The Trainer under DeepSpeed and FSDP2 in two processes: virtual workers in one, resumes to the bit, refusals."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from tests.support import cpu_deepspeed  # noqa: F401

# isort: split
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

from hf_extrap.training.checkpoints.folders import MANIFEST_FILE
from tests.support.tiny_trainer import NESTEROV, Warnings, gpt2, make, train, weights
from tests.support.trainer_engines import fsdp, whole, zero

pytestmark = pytest.mark.distributed


GLOBAL = ["none", "extragradient", "optimistic", "past-update"]
PRESETS = {
    "zero2": ["none", "optimistic", "extrap", "extrap-past"],
    "zero3": ["extragradient", "optimistic"],
    "fsdp2": GLOBAL,
}
MATRIX = {
    "zero0": [*GLOBAL, "extrap", "extrap-past"],
    "zero2": ["extrap-past", "extragradient", "past-update", "sam"],
    "zero3": ["optimistic", "none", "past-update"],
}
RESUMED = {"zero0": "extrap-past", "zero2": "extrap-past", "zero3": "optimistic", "fsdp2": "optimistic"}
OWN: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}


class StopAfter(TrainerCallback):
    """Ends a run early, without saving."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
        control.should_save &= state.global_step < self.step


def in_processes(folder: Path, engine: str, *presets: str) -> dict[str, Any]:
    warnings = Warnings()
    seen: dict[str, Any] = {}
    fields = fsdp() if engine == "fsdp2" else {"deepspeed": zero(engine)}
    for preset in presets:
        for steps in (1, 2):
            trainer = train(folder / "equivalent", extrap=preset, extrap_virtual_workers=steps, **fields, **NESTEROV)
            check(trainer, engine)
            seen[f"{preset} {steps}"] = whole(trainer)
            seen[f"{preset} {steps} logs"] = [row for row in trainer.state.log_history if "loss" in row]
    evaluated = {"extrap": RESUMED[engine], "eval_strategy": "steps", "eval_steps": 2, **fields, **NESTEROV}
    seen["with evaluations"] = whole(train(folder / "busy", **evaluated))
    warnings.texts.clear()
    saving = {**evaluated, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    seen["whole"] = whole(train(folder / "whole", model=gpt2(dropout=0.1), **saving))
    seen["checkpoints"] = sorted(path.name for path in (folder / "whole").glob("checkpoint-*"))
    saved = folder / "whole" / "checkpoint-6"
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    seen["unlisted"] = files - set(json.loads((saved / MANIFEST_FILE).read_text())["files"])
    seen["files"] = sorted(path.name for path in (folder / "whole" / "checkpoint-6").glob("extrap_rank_*"))
    # Stopped one step after its last checkpoint.
    train(folder / "killed", model=gpt2(dropout=0.1), callbacks=[StopAfter(3)], **saving)
    resumed = train(folder / "killed", model=gpt2(dropout=0.1), resume=True, **saving)
    seen["resumed"] = whole(resumed)
    seen["warnings"] = list(warnings.texts)
    resumed.save_model(str(folder / "saved"))
    refused = {"extrap": "extrap", **fields, **NESTEROV}
    if engine in ("zero0", "zero2"):
        refused["deepspeed"] = {**zero(engine), **OWN}
    try:
        make(folder / "refused", **refused)
    except ValueError as error:
        seen["refusal"] = str(error)
    return seen


def check(trainer: Trainer, engine: str) -> None:
    """The engine that was asked for, and not what it silently falls back to."""
    assert trainer.args.world_size == 2
    if engine == "fsdp2":
        assert isinstance(trainer.model_wrapped, FSDPModule)
    else:
        assert isinstance(trainer.model_wrapped, deepspeed.DeepSpeedEngine)
        assert f"zero{trainer.model_wrapped.zero_optimization_stage()}" == engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


RUNS = [
    *(
        pytest.param((engine, presets), id=engine, marks=pytest.mark.matrix if engine == "zero2" else [])
        for engine, presets in PRESETS.items()
    ),
    *(pytest.param((e, presets), id=f"{e}, matrix", marks=pytest.mark.matrix) for e, presets in MATRIX.items()),
]


@pytest.fixture(scope="module", params=RUNS)
def ranks(request: pytest.FixtureRequest, folder: Path, run_processes: Callable[..., Any]) -> list[dict[str, Any]]:
    """What the two processes saw under one engine."""
    engine, presets = request.param
    place = folder / f"{engine}_{'_'.join(presets)}"
    facts = {"engine": engine, "presets": presets, "folder": place}
    return [{**rank, **facts} for rank in run_processes(__name__, place, engine, *presets)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, tuple[torch.Tensor, list[dict[str, Any]]]]:
    """One process that plays both workers."""
    found = {}
    for preset in [*GLOBAL, "extrap", "extrap-past", "sam"]:
        for steps in (1, 2):
            trainer = train(folder / "alone", extrap=preset, extrap_virtual_workers=2 * steps, **NESTEROV)
            rows = [row for row in trainer.state.log_history if "loss" in row]
            found[f"{preset} {steps}"] = (weights(trainer).clone(), rows)
    return found


def test_replicas_end_bit_identical(ranks: list[dict[str, Any]]) -> None:
    names = [name for name, value in ranks[0].items() if isinstance(value, torch.Tensor)]
    assert len(names) == 2 * len(ranks[0]["presets"]) + len(("with evaluations", "whole", "resumed"))
    for name in names:
        assert torch.equal(ranks[0][name], ranks[1][name]), name


def test_two_processes_are_two_virtual_workers(
    ranks: list[dict[str, Any]], alone: dict[str, tuple[torch.Tensor, list[dict[str, Any]]]]
) -> None:
    for preset in ranks[0]["presets"]:
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


def test_a_resumed_run_is_bit_identical(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert torch.equal(rank["resumed"], rank["whole"])
        assert not rank["warnings"]


def test_rank_files_are_kept_and_rotated_with_their_checkpoints(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["checkpoints"] == ["checkpoint-4", "checkpoint-6"]
    assert ranks[0]["files"] == ["extrap_rank_0.safetensors", "extrap_rank_1.safetensors"]
    # The engine's own files are listed too, and nothing is left that is not.
    assert ranks[0]["unlisted"] == {MANIFEST_FILE}


def test_saved_files_hold_x(ranks: list[dict[str, Any]]) -> None:
    saved = GPT2LMHeadModel.from_pretrained(ranks[0]["folder"] / "saved")
    assert torch.equal(torch.cat([p.detach().flatten() for p in saved.parameters()]), ranks[0]["resumed"])


def test_unsupported_settings_are_refused(ranks: list[dict[str, Any]]) -> None:
    expected = (
        "an optimizer of its own" if ranks[0]["engine"] in ("zero0", "zero2") else "no worker has weights of its own"
    )
    assert expected in ranks[0]["refusal"] and "allowed:" in ranks[0]["refusal"]
