"""Bad numbers in one pass: in its loss, or in one element of its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class BadGradient(torch.autograd.Function):
    """0, with a gradient that is a bad number in one element and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, number: float) -> Tensor:
        ctx.number, ctx.shape = number, parameter.shape
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        bad = grads[0].new_zeros(ctx.shape)
        bad.view(-1)[-1] = ctx.number
        return bad, None


@dataclass(frozen=True)
class Fault:
    """Of one pass of one worker of one replica."""

    replica: int
    worker: int
    number: float  # NaN or an infinity
    in_loss: bool  # in the loss, or else in the gradient of one element
    at_x: bool  # in the pass at x, or else in the one at y
    parameter: int = 0

    def spoil(self, loss: Tensor, model: nn.Module) -> Tensor:
        if self.in_loss:
            return loss * self.number
        return loss + BadGradient.apply(list(model.parameters())[self.parameter], self.number)  # type: ignore[no-untyped-call]
