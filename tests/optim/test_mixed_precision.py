"""Gradient scalers, narrow directions, autocast. (The loss scale in directions: tests/invariants/test_8_units.py.)"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.plain_loop import (
    distance,
    loss_at,
    make_batch,
    make_model,
    sgd,
    values,
)


def test_an_overflow_with_unscaling_and_clipping_between() -> None:
    """Unscale, clip, step, update: the good steps are those of a run without the bad one."""
    ends = []
    for bad in (None, 2):
        model = make_model(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        optimizer = Extrapolated(sgd(list(model.parameters())), ExtrapConfig.preset("extrap"), grad_scaler=scaler)
        for step in [0, 1, 2, 3] if bad is None else [0, 1, bad, 2, 3]:
            inputs, labels = make_batch(step, 0, dtype=torch.float32)
            if step == bad:
                inputs, bad = inputs * torch.inf, None
            with optimizer.probing():
                scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward()
            optimizer.train()
            scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        ends.append(values(list(model.parameters())))
    assert optimizer.skipped_steps == 1
    assert distance(*ends) < 1e-6


def test_a_narrow_direction_does_not_decide_whether_to_step() -> None:
    """A gradient that float32 holds and a float16 direction does not: the averaged gradient is finite, so x steps.

    Skipping on what one rank alone knows would take the replicas apart.
    """
    w = nn.Parameter(torch.ones(2))
    config = ExtrapConfig.preset("extrap-past", scaling="none", step_size=1e-6, direction_dtype="float16")
    optimizer = Extrapolated(torch.optim.SGD([w], lr=1e-6), config)
    for _ in range(2):
        optimizer.train()
        (1e5 * w).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 0
    assert w.tolist() == pytest.approx([0.8, 0.8], rel=1e-5)


@pytest.mark.parametrize("preset", ["extrap", "extrap-past"])
def test_autocast(preset: str) -> None:
    """In bfloat16 arithmetic the two passes are each in a context of their own; y is seen by the second."""
    model, config = make_model(torch.float32), ExtrapConfig.preset(preset, step_size=0.5)
    optimizer = Extrapolated(sgd(list(model.parameters())), config)
    for step in range(3):
        if optimizer.wants_probe:
            with optimizer.probing(), torch.autocast("cpu", torch.bfloat16):
                at_x = loss_at(model, step)
                at_x.backward()
        optimizer.train()
        with torch.autocast("cpu", torch.bfloat16):
            at_y = loss_at(model, step)
        at_y.backward()
        optimizer.step()
        optimizer.zero_grad()
    if preset == "extrap":
        assert at_y.item() < at_x.item() - 0.01
