"""In every precision a plain loop trains, and its passes are at the configured y."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.support.measuring import CHOSEN, PRESETS, SHORT, assert_displacements, assert_gradient_at
from tests.support.modes import MODES, Trained, train

RUNS = [
    pytest.param(mode, preset, id=f"{mode}, {preset}", marks=() if preset in CHOSEN else pytest.mark.matrix)
    for mode in MODES
    for preset in PRESETS
]


@cache
def run(mode: str, preset: str, overflow_at: int | None = None) -> Trained:
    if "LoRA" in mode:
        pytest.importorskip("peft")
    return train(MODES[mode], PRESETS[preset], overflow_at=overflow_at)


@pytest.mark.parametrize(("mode", "preset"), RUNS)
def test_training_extrapolates_as_configured(mode: str, preset: str) -> None:
    """The loss falls; displacements are the configured ones; losses and gradients are those of y, not of x."""
    trained = run(mode, preset)
    first, last = trained.losses
    # Adapters are small.
    assert last < first - (0.05 if "LoRA" in mode else 0.5)
    assert trained.optimizer.step_count == 8 and trained.optimizer.skipped_steps == 0
    assert_displacements(trained.steps, PRESETS[preset])
    for step in trained.steps:
        for seen in step.passes:
            assert_gradient_at(seen, trained.clean, step.scale, 1e-6)


@pytest.mark.parametrize("preset", SHORT)
def test_a_displacement_below_the_last_place_of_bf16_is_in_effect(preset: str) -> None:
    trained = train(MODES["bf16 parameters"], SHORT[preset], steps=30)
    unseen = assert_displacements(trained.steps, SHORT[preset])
    kept = total = 0.0
    for step in trained.steps:
        for x, move in zip(step.x, step.asked(SHORT[preset]), strict=True):
            nearest = (x.double() + move).bfloat16().double() - x.double()
            kept += float((nearest * move).sum())
            total += float(move.square().sum())
    assert 1 - kept / total > unseen + 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_an_overflow_in_fp16_is_skipped_and_x_restored(preset: str) -> None:
    """At a scale of 2⁶⁰ no half-precision gradient is finite; afterwards the scheme continues, from the past cold."""
    trained, config = run("fp16 and GradScaler", preset, overflow_at=4), PRESETS[preset]
    bad, after = trained.steps[4:6]
    assert not all(torch.isfinite(g).all() for g in bad.y.gradient.values())
    assert trained.optimizer.skipped_steps == 1 and trained.optimizer.step_count == 7
    assert bad.scale == 2.0**60 and after.scale == 2.0**10
    assert all(torch.equal(p, q) for p, q in zip(bad.x, after.x, strict=True))
    away = [any(not torch.equal(p, q) for p, q in zip(s.x, s.y.at, strict=True)) for s in trained.steps]
    assert away == [not config.is_past and preset != "extrap", True, True, True, True, not config.is_past, True, True]
    assert_displacements(trained.steps[:4], config)
    assert_displacements(trained.steps[6:], config)
    assert trained.losses[1] < trained.losses[0] - 0.5
