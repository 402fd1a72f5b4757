"""Invariant 2 under an exception at any tensor operation: the parameters can be brought back to x, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import PRESETS, identical, take_step, values


class Interrupt(TorchFunctionMode):
    """A KeyboardInterrupt in the place of operation number `at` on tensors, assignments of `.data` and `.grad` among
    them; reading an attribute is no operation."""

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
    """Keeps x before and after its last step, which no interrupt meets."""

    after: list[Tensor] | None = None

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        with torch._C.DisableTorchFunction():
            super().step(closure)
            self.after = values(self.param_groups[0]["params"])


def warm(preset: str, swap: bool) -> tuple[nn.Module, Recording, Extrapolated, Callable[[], None]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    base = Recording(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = Extrapolated(base, ExtrapConfig.preset(preset, swap=swap))
    inputs = torch.randn(4, 3)

    def backward() -> None:
        nn.functional.mse_loss(model(inputs), inputs[:, :2]).backward()

    for _ in range(2):
        take_step(optimizer, backward)
    return model, base, optimizer, backward


def addresses(model: nn.Module) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_interrupted_step_keeps_x(preset: str, swap: bool) -> None:
    """Of the probe, the move, both passes, the step: x before the base optimizer's step, and after it the new x."""
    model, base, optimizer, backward = warm(preset, swap)
    memory, lost, at = addresses(model), [], 0
    interrupted = True
    while interrupted:
        x, base.after, steps = values(list(model.parameters())), None, optimizer.step_count
        try:
            with Interrupt(at):
                take_step(optimizer, backward)
            interrupted = False
        except KeyboardInterrupt:
            (optimizer.restore, optimizer.eval)[at % 2]()
            expected = x if base.after is None else base.after
            if not identical(expected, list(model.parameters())) or addresses(model) != memory:
                lost.append(at)
            assert optimizer.step_count - steps <= (base.after is not None)
            optimizer.zero_grad()
        take_step(optimizer, backward)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        at += 1
    assert at > 20 and not lost, f"x is lost by an interrupt at {len(lost)} of {at} operations: {lost}"


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_interrupted_restoration_can_be_repeated(preset: str, swap: bool) -> None:
    model, _, optimizer, backward = warm(preset, swap)
    memory, lost, at = addresses(model), [], 0
    interrupted = True
    while interrupted:
        x = values(list(model.parameters()))
        if optimizer.wants_probe:
            with optimizer.probing():
                backward()
        optimizer.train()
        assert not identical(x, list(model.parameters()))
        try:
            with Interrupt(at):
                optimizer.restore()
            interrupted = False
        except KeyboardInterrupt:
            optimizer.restore()
        if not identical(x, list(model.parameters())) or addresses(model) != memory:
            lost.append(at)
        optimizer.zero_grad()
        take_step(optimizer, backward)
        at += 1
    assert at > 2 and not lost, f"x is lost by an interrupt at {len(lost)} of {at} operations: {lost}"
