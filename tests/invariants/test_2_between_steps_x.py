"""Invariant 2: outside forward and backward the parameters hold x, bit for bit: x is kept, not recomputed.

Also after an exception at any tensor operation: the parameters can be restored to x.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import (
    PRESETS,
    distance,
    identical,
    loss_at,
    make_model,
    run_plain_loop,
    sgd,
    take_passes,
    take_step,
    values,
)


def warm(preset: str, swap: bool | None = None) -> tuple[nn.Module, Extrapolated, ExtrapConfig]:
    """A model and its optimizer after three steps, so that no direction is cold."""
    model, config = make_model(torch.float32), ExtrapConfig.preset(preset, swap=swap)
    optimizer = Extrapolated(sgd(list(model.parameters())), config)
    run_plain_loop(model, optimizer, config, [0], steps=3)
    return model, optimizer, config


def enter(model: nn.Module, optimizer: Extrapolated) -> None:
    """Extrapolate and compute the gradient at y."""
    take_passes(optimizer, lambda *_: loss_at(model, 3).backward())


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
def test_reading_the_weights_restores_x(leave: Callable[[Extrapolated], object], preset: str) -> None:
    model, optimizer, _ = warm(preset)
    x = values(list(model.parameters()))
    enter(model, optimizer)
    assert distance(x, list(model.parameters())) > 1e-5
    leave(optimizer)
    assert identical(x, list(model.parameters()))


@pytest.mark.parametrize("preset", PRESETS)
def test_200_extrapolations_leave_x_unchanged(preset: str) -> None:
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
def test_200_steps_of_length_zero_leave_x_unchanged(preset: str) -> None:
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


@pytest.mark.parametrize("preset", ["extrap-past", "extrap"])
def test_an_error_in_a_forward_pass_restores_x(preset: str) -> None:
    """In a regular pass, and in a probe, whose gradients are dropped."""
    model, optimizer, config = warm(preset)
    x = values(list(model.parameters()))
    with pytest.raises(RuntimeError), optimizer.probing() if optimizer.wants_probe else nullcontext():
        if not optimizer.wants_probe:
            optimizer.train()
        model(torch.zeros(1, 4))
    optimizer.eval()
    assert identical(x, list(model.parameters()))
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    run_plain_loop(model, optimizer, config, [0], first=3, steps=1)


@pytest.mark.parametrize("swap", [True, False])
def test_a_backward_pass_through_another_point_is_an_error(swap: bool) -> None:
    """Autograd notices that the weights of the forward pass are gone."""
    model, optimizer, _ = warm("extrap-past", swap)
    for to, away in ((optimizer.restore, optimizer.train), (optimizer.train, optimizer.restore)):
        to()
        loss = loss_at(model, 3)
        away()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class Interrupt(TorchFunctionMode):
    """Raises KeyboardInterrupt instead of tensor operation number `at`; assigning `.data` or `.grad` is one."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at
        self.raised = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if not self.raised and name not in ("__get__", "_set_grad_enabled", "set_grad_enabled"):
            self.left -= 1
            if self.left < 0:
                self.raised = True
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


class Recording(torch.optim.SGD):
    """Keeps x after its last step, which no interrupt meets."""

    after: list[Tensor] | None = None

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        with torch._C.DisableTorchFunction():
            super().step(closure)
            self.after = values(self.param_groups[0]["params"])


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("interrupted", ["step", "restore"])
def test_an_interrupt_at_any_operation_keeps_x(interrupted: str, preset: str, swap: bool) -> None:
    """Of a step (probe, move, both passes, base optimizer) or of a restoration, which can be repeated.

    x is that before the base optimizer's step, and after that step the new one.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    base = Recording(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = Extrapolated(base, ExtrapConfig.preset(preset, swap=swap))
    inputs, params = torch.randn(4, 3), list(model.parameters())

    def backward() -> None:
        nn.functional.mse_loss(model(inputs), inputs[:, :2]).backward()

    for _ in range(2):
        take_step(optimizer, backward)
    memory, lost, at = [p.data_ptr() for p in params], [], 0
    done = False
    while not done:
        x, base.after, steps = values(params), None, optimizer.step_count
        if interrupted == "restore":
            take_passes(optimizer, lambda v, index, probe: backward() if probe else None)
            assert not identical(x, params)
        try:
            with Interrupt(at):
                optimizer.restore() if interrupted == "restore" else take_step(optimizer, backward)
            done = True
        except KeyboardInterrupt:
            (optimizer.restore, optimizer.eval)[at % 2]()
            assert optimizer.step_count - steps <= (base.after is not None)
        if not identical(x if base.after is None else base.after, params) or [p.data_ptr() for p in params] != memory:
            lost.append(at)
        optimizer.zero_grad()
        take_step(optimizer, backward)
        assert all(torch.isfinite(p).all() for p in params)
        at += 1
    assert at > (20 if interrupted == "step" else 2)
    assert not lost, f"x is lost by an interrupt at {len(lost)} of {at} operations: {lost}"
