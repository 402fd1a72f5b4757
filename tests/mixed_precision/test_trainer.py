"""In every precision ExtrapTrainer takes the steps of the plain loop, which test_plain_loops.py checks pass by pass."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_extrap import ExtrapTrainer, ExtrapTrainingArguments
from tests.support.measuring import CHOSEN, PRESETS
from tests.support.modes import MODES, train
from tests.support.plain_loop import distance, identical, values
from tests.support.tiny_trainer import Sentences, arguments, gpt2

STEPS = 8
FIELDS: dict[str, dict[str, Any]] = {"extrap": {"extrap_step_size": "0.5"}, "extrap-past": {"extrap_step_size": "0.5"}}
COMPILING = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
# Fields of the Trainer's arguments, the plain loop's mode, and the relative tolerance of the way of the weights.
CELLS: dict[str, tuple[dict[str, Any], str, float]] = {
    "float32": ({}, "float32", 1e-4),
    "bf16": ({"bf16": True}, "bf16 autocast", 0.05),
    "bf16 parameters": ({}, "bf16 parameters", 0.05),
    "fp16 and GradScaler": ({}, "fp16 and GradScaler", 0.05),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, "float32", 1e-4),
    "gradient_checkpointing and bf16": ({"gradient_checkpointing": True, "bf16": True}, "bf16 autocast", 0.05),
    "torch_compile": (COMPILING, "float32", 1e-3),
    "LoRA": ({}, "LoRA", 1e-4),
    "LoRA and bf16": ({"bf16": True}, "LoRA, bf16 autocast", 0.05),
}
RUNS = [
    pytest.param(cell, preset, marks=() if preset in CHOSEN else pytest.mark.matrix)
    for cell in CELLS
    for preset in PRESETS
    # The Trainer puts the parameters into two groups, and so draws other noise for each than the loop.
    if (cell != "torch_compile" or preset == "extrap") and not PRESETS[preset].is_noise
]


class HalfTrainer(ExtrapTrainer):
    """Computes in float16 with a scaled loss if `half`, which accelerate refuses on a CPU; keeps x before each step."""

    half = False
    overflow_at: int | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.half and self.accelerator.scaler is None:
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, backoff_factor=2.0**-50)
        self.x: list[list[Tensor]] = []
        self.rates: list[float] = []
        return super().create_optimizer(model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.x) == self.overflow_at:
            self.accelerator.scaler.update(2.0**60)
        self.x.append(values([p for p in self.model.parameters() if p.requires_grad]))
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.float16, enabled=self.half):
            return super().compute_loss(model, inputs, *args, **kwargs)


@cache
def run(cell: str, preset: str, overflow_at: int | None = None) -> HalfTrainer:
    fields, mode, _ = CELLS[cell]
    if "LoRA" in mode:
        pytest.importorskip("peft")
    fixed = {"per_device_train_batch_size": 16, "max_steps": STEPS, "max_grad_norm": 0.0, "sgd_momentum": 0.5}
    if overflow_at is None:
        fixed["lr_scheduler_type"] = "constant"
    fixed |= {"learning_rate": MODES[mode].rate, "sgd_nesterov": True, "report_to": "none"}
    with TemporaryDirectory() as folder:
        kind = ExtrapTrainingArguments
        args = arguments(folder, kind, extrap=preset, seed=0, **{**fixed, **FIELDS.get(preset, {}), **fields})
        model = gpt2() if fields.get("gradient_checkpointing") else MODES[mode].change(gpt2())
        trainer = HalfTrainer(model, args, train_dataset=Sentences(16))
        trainer.half, trainer.overflow_at = MODES[mode].scaled, overflow_at
        trainer.train()
    assert trainer.extrapolated.config == PRESETS[preset]
    return trainer


@pytest.mark.parametrize(("cell", "preset"), RUNS)
def test_the_trainer_takes_the_steps_of_the_plain_loop(cell: str, preset: str) -> None:
    _, mode, tolerance = CELLS[cell]
    trainer, expected = run(cell, preset), train(MODES[mode], PRESETS[preset])
    assert trainer.extrapolated.step_count == STEPS and trainer.extrapolated.skipped_steps == 0
    for t, step in enumerate(expected.steps):
        way = max(distance(step.x, expected.steps[0].x), 1e-6)
        assert distance(trainer.x[t], step.x) <= tolerance * way, f"x before step {t}"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_that_overflows_is_skipped_and_restores_x(preset: str) -> None:
    """Evaluations and checkpoints see x, and the learning-rate schedule does not advance."""
    trainer = run("fp16 and GradScaler", preset, overflow_at=4)
    assert identical(trainer.x[4], trainer.x[5]) and trainer.rates[4] == trainer.rates[5] > trainer.rates[6]
    assert not identical(trainer.x[5], trainer.x[6])
    assert trainer.extrapolated.skipped_steps == 1 and trainer.extrapolated.step_count == STEPS - 1
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_adapters_are_saved_at_x(tmp_path: Path) -> None:
    """`save_model` writes x, and the frozen base has not changed."""
    peft = pytest.importorskip("peft")
    trainer = run("LoRA", "extrap-past")
    trainer.save_model(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path)
    for (name, p), (_, q) in zip(loaded.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
