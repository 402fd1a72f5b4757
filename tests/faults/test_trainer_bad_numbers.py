"""The Trainer logs the mean of the finite losses, and stops after too many skipped steps in a row."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer

from hf_extrap import ExtrapTrainer
from hf_extrap.training.callbacks import DivergenceStopper
from tests.support.tiny_trainer import Warnings, make


class Spoiled:
    """Finds a NaN in the loss of the steps `bad`, and keeps the losses of the others."""

    bad: Collection[int] = ()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        trainer: Any = self
        if not hasattr(trainer, "finite"):
            trainer.finite = {}
        step, loss = trainer.state.global_step, super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        if step in self.bad:
            return loss * math.nan  # type: ignore[no-any-return]
        trainer.finite.setdefault(step, []).append(float(loss.detach()))
        return loss  # type: ignore[no-any-return]


class SpoiledTrainer(Spoiled, ExtrapTrainer):
    pass


class SpoiledStockTrainer(Spoiled, Trainer):
    pass


def spoiled(folder: Path, bad: Collection[int], kind: type[Trainer] = SpoiledTrainer, **fields: Any) -> Any:
    trainer: Any = make(folder, kind, **fields)
    trainer.bad = bad
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "past-update", "gaussian"])
def test_too_many_skipped_steps_end_the_run(preset: str, tmp_path: Path) -> None:
    warnings = Warnings()
    trainer = spoiled(tmp_path, range(5, 1000), extrap=preset, max_steps=200)
    message = (
        r"^30 steps in a row were skipped up to step 35, each for a gradient that is not finite; allowed: fewer than "
        r"30 \(max_skipped_steps\), by a smaller learning_rate \(0.05\) or extrapolation step size, or by data without "
        r"NaN.$"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.extrapolated.skipped_steps == 30
    assert sum("was skipped" in text for text in warnings.texts) == 5  # 1, 2, 4, 8, 16
    assert all(math.isfinite(loss) == (step < 5) for step, loss in enumerate(losses(trainer)))


def test_none_is_no_limit(tmp_path: Path) -> None:
    trainer = spoiled(tmp_path, range(5, 1000), extrap="extrap-past", max_steps=45, max_skipped_steps=None)
    trainer.train()
    assert trainer.extrapolated.skipped_steps == 40 and trainer.state.log_history[-2]["extrap/skipped_steps"] == 40


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "many"])
def test_the_limit_is_a_whole_number(limit: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^max_skipped_steps is .*; allowed: a whole number"):
        make(tmp_path, max_skipped_steps=limit)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_logged_loss_is_the_mean_of_the_finite_ones(accumulation: int, tmp_path: Path) -> None:
    bad = {0, 1, 5, 8, 9, 10, 11}
    fields = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    trainer = spoiled(tmp_path, bad, extrap="extrap-past", max_steps=14, logging_steps=4, **fields)
    output = trainer.train()
    means = {step: sum(found) / len(found) for step, found in trainer.finite.items()}
    for row, logged in enumerate(losses(trainer)):
        finite = [means[step] for step in range(4 * row, 4 * row + 4) if step in means]
        assert logged == pytest.approx(sum(finite) / len(finite), rel=1e-5) if finite else math.isnan(logged)
    assert [math.isnan(loss) for loss in losses(trainer)] == [False, False, True]
    assert output.training_loss == pytest.approx(sum(means.values()) / len(means), rel=1e-5)


def test_a_resumed_run_logs_the_same_means(tmp_path: Path) -> None:
    """The checkpoint is inside a row, after a bad step of it."""
    fields: dict[str, Any] = {"extrap": "extrap-past", "max_steps": 12, "logging_steps": 6, "save_strategy": "steps"}
    whole = spoiled(tmp_path / "run", {1, 7, 8}, save_steps=9, **fields)
    end = whole.train().training_loss
    resumed = spoiled(tmp_path / "run", {1, 7, 8}, save_steps=9, **fields)
    again = resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9")).training_loss
    assert losses(resumed) == losses(whole) and again == pytest.approx(end, rel=1e-9)


def test_without_extrapolation_the_stock_losses_are_logged(tmp_path: Path) -> None:
    """A NaN is stepped with, and the stock filter logs the loss of later steps as 0."""
    rows = [
        losses(trainer)
        for kind in (SpoiledTrainer, SpoiledStockTrainer)
        for trainer in [spoiled(tmp_path, {3}, kind, max_steps=6)]
        if trainer.train()
    ]
    assert rows[0] == rows[1] and rows[0][3:] == [0, 0, 0]


def test_one_bad_batch_is_no_divergence_and_a_row_of_them_is(tmp_path: Path) -> None:
    ends = []
    for bad in ({3}, range(3, 100), {0, *range(6, 100)}):
        stopper = DivergenceStopper(3.0)
        trainer = spoiled(tmp_path, bad, extrap="extrap-past", max_steps=14, max_skipped_steps=5, callbacks=[stopper])
        trainer.train()
        ends.append((stopper.step, trainer.state.global_step))
    assert ends == [(None, 14), (8, 8), (11, 11)]


def test_the_history_of_a_run_with_skipped_steps_is_written(tmp_path: Path) -> None:
    trainer = spoiled(tmp_path, {3}, extrap="extrap-past", max_steps=5)
    trainer.train()
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    rows = json.loads((tmp_path / "state.json").read_text())["log_history"]
    assert math.isnan(rows[3]["loss"]) and rows[3]["extrap/skipped_steps"] == 1


class Normalized(nn.Module):
    """A classifier with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.head = nn.Embedding(50, 8), nn.BatchNorm1d(8), nn.Linear(8, 50)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.embedding(input_ids).mean(1))
        if self.training and self.spoiled():
            hidden = self.norm(hidden * math.nan)
        return {"loss": nn.functional.cross_entropy(self.head(hidden), labels[:, 0])}

    def spoiled(self) -> bool:
        return False


@pytest.mark.parametrize("preset", ["extrap", "extrap-past"])
def test_a_skipped_step_leaves_no_trace_in_running_statistics(preset: str, tmp_path: Path) -> None:
    """A batch of NaN would leave BatchNorm's statistics, and so every evaluation, NaN for good."""
    model: Any = Normalized()
    fields: dict[str, Any] = {"extrap": preset, "max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = make(tmp_path, model=model, eval_strategy="steps", eval_steps=1, **fields)
    seen = []
    model.spoiled = lambda: trainer.state.global_step in (1, 3)
    evaluate = trainer.evaluate

    def watched(*args: Any, **kwargs: Any) -> Any:
        metrics = evaluate(*args, **kwargs)
        seen.append([metrics["eval_loss"], model.norm.running_mean.clone(), model.norm.running_var.clone()])
        return metrics

    trainer.evaluate = watched
    trainer.train()
    assert trainer.extrapolated.skipped_steps == 2
    (loss, *statistics), (same_loss, *same), (other, *_), (same_other, *_) = seen
    assert math.isfinite(loss) and loss == same_loss and math.isfinite(other) and other == same_other != loss
    assert all(torch.equal(a, b) for a, b in zip(statistics, same, strict=True))
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert torch.isfinite(saved["norm.running_var"]).all()
