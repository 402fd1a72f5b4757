"""Invariant 2: outside forward and backward the parameters hold x, bit for bit: x is kept, not recomputed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.plain_loop import (
    CELLS,
    PRESETS,
    distance,
    identical,
    make_batch,
    make_model,
    run_plain_loop,
    sgd,
    values,
)


def warm(preset: str, **overrides: object) -> tuple[nn.Module, Extrapolated, ExtrapConfig]:
    """A model and its optimizer after three steps, so that no direction is cold."""
    model = make_model(torch.float32)
    config = ExtrapConfig.preset(preset, **overrides)
    optimizer = Extrapolated(sgd(list(model.parameters())), config)
    run_plain_loop(model, optimizer, config, [0], steps=3)
    return model, optimizer, config


def enter(model: nn.Module, optimizer: Extrapolated) -> None:
    """Go to y and take the gradient there."""
    inputs, labels = make_batch(3, 0, dtype=torch.float32)
    if optimizer.wants_probe:
        with optimizer.probing():
            nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.train()
    nn.functional.cross_entropy(model(inputs), labels).backward()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "leave",
    [
        lambda optimizer: optimizer.eval(),
        lambda optimizer: optimizer.state_dict(),
        lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    ],
    ids=["eval", "state_dict", "load_state_dict"],
)
def test_whatever_reads_the_weights_finds_x(leave: Callable[[Extrapolated], object], preset: str) -> None:
    model, optimizer, _ = warm(preset)
    x = values(list(model.parameters()))
    enter(model, optimizer)
    assert distance(x, list(model.parameters())) > 1e-5
    leave(optimizer)
    assert identical(x, list(model.parameters()))


@pytest.mark.parametrize("preset", PRESETS)
def test_200_visits_leave_x_untouched(preset: str) -> None:
    """y + η d would have drifted."""
    model, optimizer, config = warm(preset)
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], group["lr"]
    x = values(list(model.parameters()))
    for _ in range(200):
        enter(model, optimizer)
        optimizer.eval()
        optimizer.zero_grad()
    assert identical(x, list(model.parameters()))


@pytest.mark.parametrize("preset", PRESETS)
def test_200_steps_of_length_zero_leave_x_untouched(preset: str) -> None:
    model = make_model(torch.float32)
    x = values(list(model.parameters()))
    # A share of a step of length zero would be no move at all.
    unscaled = {"scaling": "none"} if ExtrapConfig.preset(preset).scales_by_step else {}
    config = ExtrapConfig.preset(preset, step_size=0.1, anneal=False, **unscaled)
    optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=1e-30), config)
    run = run_plain_loop(model, optimizer, config, [0], steps=200)
    assert identical(x, list(model.parameters()))
    if config.direction != "past_update":  # which is zero when x does not move
        assert distance(run.y[5][0], x) > 1e-3


def test_the_base_steps_from_x() -> None:
    """With lr = 0.1 and no momentum, x − 0.1 g(y) exactly as float arithmetic gives it."""
    model = make_model(torch.float32)
    config = ExtrapConfig.preset("extrap", scaling="none", step_size=0.5)
    optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=0.1), config)
    x = values(list(model.parameters()))
    enter(model, optimizer)
    g = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert identical([p.add(v, alpha=-0.1) for p, v in zip(x, g, strict=True)], list(model.parameters()))


def test_an_error_in_the_forward_pass_loses_nothing() -> None:
    model, optimizer, _ = warm("extrap-past")
    x = values(list(model.parameters()))
    optimizer.train()
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 4))
    optimizer.eval()
    assert identical(x, list(model.parameters()))


def test_an_error_while_probing_loses_nothing() -> None:
    model, optimizer, _ = warm("extrap")
    x = values(list(model.parameters()))
    with pytest.raises(RuntimeError), optimizer.probing():
        model(torch.zeros(1, 4))
    assert identical(x, list(model.parameters()))
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    run_plain_loop(model, optimizer, CELLS["extrap"].config, [0], first=3, steps=1)


def test_moving_between_forward_and_backward_is_an_error() -> None:
    """Never a wrong number: autograd must notice that the weights of the forward pass are gone."""
    model, optimizer, _ = warm("extrap-past")
    inputs, labels = make_batch(3, 0, dtype=torch.float32)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    optimizer.train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
