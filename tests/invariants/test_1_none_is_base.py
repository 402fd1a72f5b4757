"""Invariant 1: with no direction, a step size of 0, or outside the window: the base optimizer alone, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import adamw, identical, make_batch, make_model, run_plain_loop, sgd, warm_up_and_decay

Base = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


def adam_foreach(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05, foreach=True, amsgrad=True)


IDLE = {
    "none": ExtrapConfig.preset("none"),
    "step size 0": ExtrapConfig.preset("extrap", step_size=0.0),
    "past, step ratio 0": ExtrapConfig.preset("extrap-past", step_ratio=0.0),
    "noise, step size 0": ExtrapConfig.preset("gaussian", step_size=0.0),
    "capped, step size 0": ExtrapConfig.preset("sam", step_size=0.0, max_displacement=0.1),
    "before its start": ExtrapConfig.preset("extrap", start_step=100),
}


def train_bare(make_base: Base, workers: int, dtype: torch.dtype, steps: int) -> list[Tensor]:
    model = make_model(dtype)
    optimizer = make_base(list(model.parameters()))
    scheduler = warm_up_and_decay(optimizer)
    for step in range(steps):
        for k in range(workers):
            inputs, labels = make_batch(step, k, dtype=dtype)
            (nn.functional.cross_entropy(model(inputs), labels) / workers).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("make_base", [sgd, adamw, adam_foreach])
@pytest.mark.parametrize("workers", [3, pytest.param(1, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", IDLE)
def test_none_is_the_base(name: str, dtype: torch.dtype, workers: int, make_base: Base) -> None:
    model = make_model(dtype)
    optimizer = Extrapolated(make_base(list(model.parameters())), IDLE[name], virtual_workers=workers)
    scheduler = warm_up_and_decay(optimizer)
    run = run_plain_loop(model, optimizer, IDLE[name], range(workers), steps=20, scheduler=scheduler, max_grad_norm=0.5)
    assert identical(run.x[-1], train_bare(make_base, workers, dtype, 20))
    assert all(identical(y, x) for x, ys in zip(run.x, run.y, strict=False) for y in ys)
    assert optimizer.skipped_steps == 0


def test_after_its_end_it_is_the_base_again() -> None:
    """From equal points and states, the steps after `end_step` are the base's."""
    config = ExtrapConfig.preset("extrap-past", step_ratio=0.5, end_step=4)
    model = make_model()
    optimizer = Extrapolated(sgd(list(model.parameters())), config)
    run_plain_loop(model, optimizer, config, [0], steps=4)
    bare_model = make_model()
    bare_model.load_state_dict(model.state_dict())
    bare = sgd(list(bare_model.parameters()))
    state = copy.deepcopy(optimizer.state_dict())
    bare.load_state_dict({key: state[key] for key in ("state", "param_groups")})
    run = run_plain_loop(model, optimizer, config, [0], first=4, steps=5)
    for step in range(4, 9):
        inputs, labels = make_batch(step, 0)
        nn.functional.cross_entropy(bare_model(inputs), labels).backward()
        bare.step()
        bare.zero_grad()
    assert identical(run.x[-1], list(bare_model.parameters()))


@pytest.mark.parametrize("name", [name for name in IDLE if name != "before its start"])
def test_a_non_finite_gradient_reaches_the_base_as_it_would_alone(name: str) -> None:
    model = make_model()
    optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=0.1), IDLE[name])
    assert not optimizer.wants_probe
    optimizer.train()
    (model(torch.full((1, 5), torch.inf, dtype=torch.float64)).sum()).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not all(torch.isfinite(p).all() for p in model.parameters())
