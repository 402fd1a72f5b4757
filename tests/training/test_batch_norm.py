"""The Trainer with BatchNorm and augmentation: batch counts, augmented passes, statistics of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.tiny_images import buffers, train_images


def test_batches_and_augmentations_of_steps_and_workers(tmp_path: Path) -> None:
    passes: dict[tuple[str, int], list[Tensor]] = {("extrap", 2): [], ("none", 2): [], ("none", 1): []}
    for (preset, workers), seen in passes.items():
        trainer = train_images(tmp_path, extrap=preset, extrap_virtual_workers=workers, max_steps=2, seen=seen)
        # A step counts one batch, whatever its workers and probes.
        counts = {int(b) for name, b in trainer.model.named_buffers() if name.endswith("num_batches_tracked")}
        assert counts == {2}
    fresh, two, one = passes.values()
    # Both passes of a step see the same augmented batches.
    assert [sum(torch.equal(batch, other) for other in fresh) for batch in two] == [2] * 4
    assert not torch.equal(one[0], torch.from_numpy(trainer.train_dataset.images[:4]))
    # Step 0, worker 0 is the same in both runs; another worker and another step draw anew.
    assert torch.equal(two[0], one[0]) and not torch.equal(two[1], one[1])


def test_a_resumed_run_is_the_uninterrupted_one_with_its_statistics(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"extrap": "extrap-past", "extrap_virtual_workers": 2, "save_strategy": "steps"}
    whole = train_images(tmp_path / "whole", save_steps=2, max_steps=4, **fields)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = train_images(tmp_path / "resumed", save_steps=2, max_steps=4, resume=checkpoint, **fields)
    assert torch.equal(buffers(whole.model), buffers(resumed.model))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_recalibration_gives_the_statistics_of_the_last_batches_at_x(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    fields: dict[str, Any] = {"extrap": "extrap-past", "extrap_virtual_workers": 2, "max_steps": 3}
    trainer = train_images(tmp_path, recalibrate_batch_norm=3, seen=seen, **fields)
    model = trainer.model
    batches, parameters = seen[-3:], [p.clone() for p in model.parameters()]
    trained = buffers(model)
    trainer.evaluate()
    stem = model.resnet.embedder
    with torch.no_grad():
        hidden = [stem.convolution(model.normalization(batch)) for batch in batches]
    mean = torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
    variance = torch.stack([h.transpose(0, 1).flatten(1).var(1) for h in hidden]).mean(0)
    torch.testing.assert_close(stem.normalization.running_mean, mean)
    torch.testing.assert_close(stem.normalization.running_var, variance)
    assert not torch.equal(buffers(model), trained)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    stem.normalization.running_mean.zero_()
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.allclose(stem.normalization.running_mean, mean)


def test_recalibrations_while_training_change_no_step(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"extrap": "extrap", "eval_strategy": "steps", "eval_steps": 1}
    plain, recalibrated = (
        train_images(tmp_path, recalibrate_batch_norm=count, max_steps=3, **fields) for count in (0, 2)
    )
    for p, q in zip(plain.model.parameters(), recalibrated.model.parameters(), strict=True):
        assert torch.equal(p, q)
    losses = [[row["eval_loss"] for row in t.state.log_history if "eval_loss" in row] for t in (plain, recalibrated)]
    assert len(losses[0]) == 3 and losses[0] != losses[1]


def test_one_recalibration_serves_until_the_model_changes(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    fields: dict[str, Any] = {"extrap": "extrap-past", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    trainer = train_images(tmp_path, recalibrate_batch_norm=3, seen=seen, **fields)
    # Four steps, then a recalibration with two batches at step 2 and one with three at step 4.
    assert len(seen) == 4 + 2 + 3
    settled = buffers(trainer.model)
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    assert len(seen) == 9 and torch.equal(buffers(trainer.model), settled)
    with torch.no_grad():
        next(trainer.model.resnet.parameters()).mul_(1.5)
    trainer.evaluate()
    assert len(seen) == 12 and not torch.equal(buffers(trainer.model), settled)
    trainer.model.resnet.embedder.normalization.running_var.data.add_(1)
    trainer.evaluate()
    assert len(seen) == 15
