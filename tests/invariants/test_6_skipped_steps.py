"""Invariant 6: a skipped step leaves x and the base's state as they were, drops the direction, and is reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.reference import extrapolate
from tests.support.plain_loop import (
    AUTO_AND_CAPPED,
    BASES,
    distance,
    identical,
    make_batch,
    make_model,
    run_plain_loop,
    take_passes,
    values,
    worker_losses,
)

PAST = ["extrap-past", "optimistic", "past-update"]
OTHERS = ["extrap", "extragradient", "gaussian", "smoothout", "sam", "asam"]


def poisoned(bad_step: int, bad_worker: int, dtype: torch.dtype) -> Callable[[int, int, bool], tuple[Tensor, Tensor]]:
    """Batches of which one holds an infinity."""

    def batch(step: int, worker: int, probe: bool) -> tuple[Tensor, Tensor]:
        inputs, labels = make_batch(step, worker, probe, dtype)
        if (step, worker) == (bad_step, bad_worker):
            inputs = torch.full_like(inputs, torch.nan)
        return inputs, labels

    return batch


def states(optimizer: Extrapolated) -> list[Tensor]:
    return [v.clone() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("preset", PAST + OTHERS)
def test_a_non_finite_gradient_skips_the_step(preset: str, base: str) -> None:
    model = make_model()
    config = ExtrapConfig.preset(preset)
    optimizer = Extrapolated(BASES[base](list(model.parameters())), config, virtual_workers=2)
    batch = poisoned(3, 1, torch.float64)
    run_plain_loop(model, optimizer, config, [0, 1], steps=3, batch=batch)
    x, state = values(list(model.parameters())), states(optimizer)
    assert len(state) >= 4
    assert optimizer.skipped_steps == 0

    run_plain_loop(model, optimizer, config, [0, 1], first=3, steps=1, batch=batch)
    assert identical(x, list(model.parameters()))
    assert identical(state, states(optimizer))
    assert optimizer.skipped_steps == 1

    run = run_plain_loop(model, optimizer, config, [0, 1], first=4, steps=2, batch=batch)
    moved = [distance(y, x) for x, ys in zip(run.x, run.y, strict=False) for y in ys]
    if preset in PAST:
        assert moved[:2] == [0, 0]
    else:
        assert min(moved[:2]) > 1e-5
    assert min(moved[2:]) > 1e-5
    assert optimizer.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


SKIPPING = {
    **{preset: ExtrapConfig.preset(preset) for preset in [*PAST, "extrap", "extragradient", "sam"]},
    **AUTO_AND_CAPPED,
    "before its start": ExtrapConfig.preset("extrap-past", start_step=5),
    "after its end": ExtrapConfig.preset("extrap-past", end_step=2),
    "at its end": ExtrapConfig.preset("extrap-past", end_step=4),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_skipping_as_in_the_textbook(name: str) -> None:
    """The reference skips too: the iterates after a skipped step, which counts as none, are the same."""
    config = SKIPPING[name]
    batch = poisoned(3, 1, torch.float64)
    model = make_model()
    losses = worker_losses(model, config, 2, lambda step, k, probe: batch(step, k, False))
    textbook = extrapolate(list(model.parameters()), losses, BASES["sgd"], config, 8)
    optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), config, virtual_workers=2)
    run = run_plain_loop(model, optimizer, config, [0, 1], steps=8, batch=batch)
    assert textbook.skipped == optimizer.skipped_steps == 1
    assert max(distance(a, b) for a, b in zip(run.x, textbook.x, strict=True)) < 1e-11


CLEAR: dict[str, Callable[[nn.Module, Extrapolated], None]] = {
    "optimizer.zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "optimizer.zero_grad to 0": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad to 0": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("clear", CLEAR)
@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "past-update", "extrap", "sam"])
def test_an_overflow_under_the_grad_scaler(preset: str, clear: str) -> None:
    """The scaler itself withholds the step: x must be restored, and the infinite direction dropped."""
    model = make_model(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), ExtrapConfig.preset(preset), grad_scaler=scaler)

    def step(inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """How far y was from x, and how far x went."""
        x = values(list(model.parameters()))
        moved: list[float] = []
        take_passes(
            optimizer,
            lambda *_: scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward(),
            at_y=lambda _: moved.append(distance(x, list(model.parameters()))),
        )
        scaler.step(optimizer)
        scaler.update()
        CLEAR[clear](model, optimizer)
        optimizer.eval()
        return moved[0], distance(x, list(model.parameters()))

    for t in range(3):
        step(*make_batch(t, 0, dtype=torch.float32))
    x, state = values(list(model.parameters())), states(optimizer)
    inputs, labels = make_batch(3, 0, dtype=torch.float32)
    step(torch.full_like(inputs, torch.inf), labels)
    assert identical(x, list(model.parameters()))
    assert identical(state, states(optimizer))
    assert scaler.get_scale() == 2.0**9

    moved, went = step(*make_batch(4, 0, dtype=torch.float32))
    assert (moved == 0) == (preset in PAST)
    assert 1e-5 < went < 1
    assert optimizer.skipped_steps == 1
    moved, went = step(*make_batch(5, 0, dtype=torch.float32))
    assert 1e-5 < moved < 1 and 1e-5 < went < 1


def test_an_overflow_with_unscaling_and_clipping_between() -> None:
    """Unscale, clip, step, update: the good steps are those of a run without the bad one."""
    ends = []
    for bad in (None, 2):
        model = make_model(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        optimizer = Extrapolated(
            BASES["sgd"](list(model.parameters())), ExtrapConfig.preset("extrap"), grad_scaler=scaler
        )
        for step in [0, 1, 2, 3] if bad is None else [0, 1, bad, 2, 3]:
            inputs, labels = make_batch(step, 0, dtype=torch.float32)
            if step == bad:
                inputs, bad = inputs * torch.inf, None
            loss = lambda: nn.functional.cross_entropy(model(inputs), labels)  # noqa: E731, B023
            take_passes(optimizer, lambda *_: scaler.scale(loss()).backward())  # noqa: B023
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        ends.append(values(list(model.parameters())))
    assert optimizer.skipped_steps == 1
    assert distance(*ends) < 1e-6
