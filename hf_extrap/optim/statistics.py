"""What one step saw, for the logs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .displacement import total_norm
from .shards import whole


class StepStatistics:
    """Tensors noted during a step, read by the host once, when the step is over."""

    def __init__(self) -> None:
        self._noted: dict[str, list[Tensor]] = {}

    def note(self, name: str, *values: Tensor) -> None:
        """Take values that are averaged with those noted before."""
        if values:
            self._noted.setdefault(name, []).extend(values)

    def replace(self, name: str, *values: Tensor) -> None:
        """Take values instead of those noted before."""
        self._noted.pop(name, None)
        self.note(name, *values)

    def summary(self) -> dict[str, float]:
        """The mean of each."""
        return {name: sum(float(v) for v in values) / len(values) for name, values in self._noted.items()}


def cosine(direction: Sequence[Tensor | None], gradient: Sequence[Tensor | None]) -> Tensor:
    """The cosine of two vectors given tensor by tensor, over the tensors that both have; 0 where one vanishes."""
    pairs = [(d.to(g), g) for d, g in zip(direction, gradient, strict=True) if d is not None and g is not None]
    if not pairs:
        return torch.zeros(())
    norms = total_norm([d for d, _ in pairs]) * total_norm([g for _, g in pairs])
    dot = torch.stack([whole(torch.sum(d * g)).to(norms) for d, g in pairs]).sum()
    return dot / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def clipping_factor(averaged: Sequence[Tensor | None], local: Sequence[Tensor | None]) -> Tensor:
    """What clipping by norm has multiplied the averaged gradient by: ‖ḡ‖² / ⟨mean of the local ones, ḡ⟩.

    A collective call: one number is averaged over the processes.

    Args:
        averaged: ḡ, clipped or not.
        local: this process's own gradient, which was not.
    """
    pairs = [(a, b.to(a)) for a, b in zip(averaged, local, strict=True) if a is not None and b is not None]
    if not pairs:
        return torch.ones(())
    square = total_norm([a for a, _ in pairs]).square()
    product = torch.stack([whole(torch.sum(a * b)).to(square) for a, b in pairs]).sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(product)
        product /= dist.get_world_size()
    return shrinking(square, product)


def shrinking(after: Tensor, before: Tensor | float) -> Tensor:
    """after / before; 1 for nothing, and for what is so near to 1 that it is rounding, which small changes of the
    gradient would not bear."""
    before = torch.as_tensor(before).to(after)
    factor = after / torch.where(before == 0, torch.ones_like(before), before)
    return torch.where(((factor - 1).abs() < 1e-4) | (before == 0), torch.ones_like(factor), factor)
