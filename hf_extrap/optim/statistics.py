"""What one step saw, for the logs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .displacement import total_norm


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
    dot = torch.stack([torch.sum(d * g).to(norms) for d, g in pairs]).sum()
    return dot / norms.clamp_min(torch.finfo(norms.dtype).tiny)
