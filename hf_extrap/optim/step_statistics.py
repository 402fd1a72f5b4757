"""Statistics of one step, for the logs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .foreach import total_norm
from .sharding import whole

Gradient = Sequence[Tensor | None]


class StepStatistics:
    """Tensors noted during a step, read by the host once, at its end.

    `displacement_norm` (‖x − y‖), `step_length` (‖Δx‖), `step_size` (η), `direction_cosine` (of the local direction and
    the averaged gradient), `gradient_square` (‖ḡ‖²), `pass_square` (mean of ‖g‖² over this process's passes, each in
    the units of the mean loss) and `passes`.
    """

    def __init__(self) -> None:
        self._noted: dict[str, list[Tensor]] = {}

    def note(self, name: str, *values: Tensor) -> None:
        """Note values, which are averaged with those noted before."""
        if values:
            self._noted.setdefault(name, []).extend(values)

    def replace(self, name: str, *values: Tensor) -> None:
        """Note values in place of those noted before."""
        self._noted.pop(name, None)
        self.note(name, *values)

    def note_gradient(self, averaged: Gradient, norm: float | None, compared: Iterable[Gradient]) -> None:
        """Note ‖ḡ‖² and the cosine of each direction with ḡ.

        Args:
            averaged: ḡ.
            norm: ‖ḡ‖ where the engine has measured it, before clipping.
            compared: directions.
        """
        square = total_norm([g for g in averaged if g is not None]).square()
        self.replace("gradient_square", square if norm is None else square.new_tensor(norm**2))
        self.replace("direction_cosine", *(cosine(d, averaged) for d in compared if d))

    def note_passes(self, squares: Sequence[Tensor], loss_scale: float) -> None:
        """Note the number of this step's passes, and the mean of their ‖g‖².

        Args:
            squares: of each pass, whose loss was multiplied by `loss_scale` and divided by their number.
            loss_scale: see `squares`.
        """
        factor = (len(squares) / loss_scale) ** 2
        self.replace("pass_square", *(square * factor for square in squares))
        self.replace("passes", torch.tensor(float(len(squares))))

    def summary(self) -> dict[str, float]:
        """The mean of each statistic."""
        return {name: sum(float(v) for v in values) / len(values) for name, values in self._noted.items()}


def cosine(direction: Gradient, gradient: Gradient) -> Tensor:
    """The cosine of two vectors over the tensors that both have, 0-dim; 0 where one vanishes."""
    pairs = [(d.to(g), g) for d, g in zip(direction, gradient, strict=False) if d is not None and g is not None]
    if not pairs:
        return torch.zeros(())
    norms = total_norm([d for d, _ in pairs]) * total_norm([g for _, g in pairs])
    dot = torch.stack([whole(torch.sum(d * g)).to(norms) for d, g in pairs]).sum()
    return dot / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def clipping_factor(averaged: Gradient, local: Gradient) -> Tensor:
    """The factor by which clipping by norm has multiplied the averaged gradient: ‖ḡ‖² / ⟨mean of local ones, ḡ⟩.

    A collective call: one number is averaged over the processes.

    Args:
        averaged: ḡ, clipped or not.
        local: this process's own gradient, not clipped.
    """
    pairs = [(a, b.to(a)) for a, b in zip(averaged, local, strict=False) if a is not None and b is not None]
    if not pairs:
        return torch.ones(())
    square = total_norm([a for a, _ in pairs]).square()
    product = torch.stack([whole(torch.sum(a * b)).to(square) for a, b in pairs]).sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(product)
        product /= dist.get_world_size()
    return ratio(square, product)


def ratio(after: Tensor, before: Tensor | float) -> Tensor:
    """after / before; 1 where before is 0, and where the ratio differs from 1 by rounding alone."""
    before = torch.as_tensor(before).to(after)
    factor = after / torch.where(before == 0, torch.ones_like(before), before)
    return torch.where(((factor - 1).abs() < 1e-4) | (before == 0), torch.ones_like(factor), factor)
