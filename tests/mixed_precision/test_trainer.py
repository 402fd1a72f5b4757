"""In every precision ExtrapTrainer trains, and its passes are at the y that was asked for."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_extrap import ExtrapTrainingArguments
from tests.support.measuring import PRESETS, assert_displacements, assert_gradient_at
from tests.support.modes import BATCH, in_bf16, unchanged, with_adapters
from tests.support.tiny_trainer import Sentences, arguments, gpt2
from tests.support.watched_trainer import WatchedTrainer

STEPS = 8
FIELDS: dict[str, dict[str, Any]] = {
    "extrap": {"extrap_step_size": "0.5"},
    "extrap-past": {"extrap_step_size": "0.5"},
    "past-update": {},
    "gaussian": {},
}


@dataclass(frozen=True)
class Mode:
    fields: tuple[tuple[str, Any], ...] = ()
    change: Any = unchanged
    autocast: torch.dtype | None = None
    half: bool = False
    tolerance: float = 1e-6


COMPILING = (("torch_compile", True), ("torch_compile_backend", "aot_eager"))
MODES = {
    "float32": Mode(),
    "bf16": Mode((("bf16", True),), autocast=torch.bfloat16, tolerance=1e-3),
    "bf16 parameters": Mode(change=in_bf16),
    "fp16 and GradScaler": Mode(autocast=torch.float16, half=True),
    "gradient_checkpointing": Mode((("gradient_checkpointing", True),)),
    "gradient_checkpointing and bf16": Mode(
        (("gradient_checkpointing", True), ("bf16", True)), autocast=torch.bfloat16, tolerance=1e-3
    ),
    "torch_compile": Mode(COMPILING, tolerance=1e-5),
    "LoRA": Mode(change=with_adapters),
    "LoRA and bf16": Mode((("bf16", True),), with_adapters, autocast=torch.bfloat16, tolerance=1e-3),
}
RUNS = [(mode, preset) for mode in MODES for preset in PRESETS if mode != "torch_compile" or preset == "extrap"]


@cache
def run(name: str, preset: str, overflow_at: int | None = None) -> WatchedTrainer:
    mode = MODES[name]
    if "LoRA" in name:
        pytest.importorskip("peft")
    fields = {"learning_rate": 5.0 if "LoRA" in name else 0.3, "max_steps": STEPS, "max_grad_norm": 0.0}
    with TemporaryDirectory() as folder:
        args = arguments(
            Path(folder),
            ExtrapTrainingArguments,
            extrap=preset,
            sgd_momentum=0.5,
            **{**fields, **FIELDS[preset], **dict(mode.fields), "report_to": "none", "seed": 0},
        )
        trainer = WatchedTrainer(mode.change(gpt2()), args, train_dataset=Sentences(64))
        trainer.half, trainer.overflow_at = mode.half, overflow_at
        trainer.first = loss_of(mode, trainer, [p for p in trainer.model.parameters() if p.requires_grad])
        trainer.train()
    assert trainer.extrapolated.config == PRESETS[preset]
    return trainer


def loss_of(mode: Mode, trainer: WatchedTrainer, point: list[Tensor], inputs: Any = None) -> Tensor:
    """The loss at a point, by a model that no Trainer has touched; on the first sentences unless told otherwise."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    watched = trainer.watch.params if hasattr(trainer, "watch") else point
    by_name = {names[id(p)]: q for p, q in zip(watched, point, strict=True)}
    inputs = inputs or {"input_ids": BATCH, "labels": BATCH}
    with torch.autocast("cpu", mode.autocast) if mode.autocast is not None else nullcontext():
        return torch.func.functional_call(mode.change(gpt2()), by_name, kwargs=inputs).loss


@pytest.mark.parametrize(("mode", "preset"), RUNS)
def test_the_loss_falls(mode: str, preset: str) -> None:
    trainer = run(mode, preset)
    last = loss_of(MODES[mode], trainer, trainer.watch.params)
    assert last < trainer.first - (0.02 if "LoRA" in mode else 0.3)
    assert trainer.extrapolated.step_count == STEPS and trainer.extrapolated.skipped_steps == 0


@pytest.mark.parametrize(("mode", "preset"), RUNS)
def test_the_displacement_in_effect_is_the_one_asked_for(mode: str, preset: str) -> None:
    steps = run(mode, preset).steps
    assert len(steps) == STEPS
    assert_displacements(steps, PRESETS[preset])


@pytest.mark.parametrize(("mode", "preset"), RUNS)
def test_loss_and_gradient_are_those_of_y(mode: str, preset: str) -> None:
    trainer = run(mode, preset)
    for step, inputs in zip(trainer.steps, trainer.inputs, strict=True):
        for seen in step.passes:

            def clean(point: list[Tensor], inputs: Any = inputs) -> Tensor:
                return loss_of(MODES[mode], trainer, point, inputs)

            assert_gradient_at(seen, clean, step.scale, MODES[mode].tolerance)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_overflow_is_skipped_and_the_weights_are_x_at_once(preset: str) -> None:
    """Evaluations and checkpoints find x, and the learning-rate schedule does not advance."""
    trainer, config = run("fp16 and GradScaler", preset, overflow_at=4), PRESETS[preset]
    bad, after = trainer.steps[4:6]
    assert not all(torch.isfinite(g).all() for g in bad.y.gradient.values())
    assert all(torch.equal(p, q) for p, q in zip(bad.x, after.x, strict=True))
    assert bad.rates == after.rates and bad.scale == 2.0**60
    assert trainer.extrapolated.skipped_steps == 1 and trainer.extrapolated.step_count == STEPS - 1
    assert_displacements(trainer.steps[:4], config)
    assert_displacements(trainer.steps[6:], config)


def test_adapters_are_saved_at_x(tmp_path: Path) -> None:
    """What `save_model` writes in the middle of an extrapolated run is x, and the frozen base has not moved."""
    peft = pytest.importorskip("peft")
    trainer = run("LoRA", "extrap-past")
    trainer.save_model(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path)
    for (name, p), (_, q) in zip(loaded.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
