"""The move of the parameters from x to y = x − step · d, and back to x bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from .buffers import BufferPool, Buffers, StorageOwners, fits
from .engines.base import Engine
from .foreach import copy_, total_norm
from .random import generator_for
from .sharding import held
from .stochastic_rounding import stochastic_round

ABANDONED = -1
"""Marker: the parameters hold the extrapolated point of a step that was skipped."""


class Displacement:
    """Holds x while the parameters hold y.

    A parameter is displaced in one of two ways. In place: x is copied first, and copied back. Swapped: the parameter
    points to other memory that holds y, and later to its own again, which nothing has written to.

    x is noted before a parameter changes and forgotten after it is restored, so that `restore` gives it back after an
    exception at any point, one inside `restore` included.

    Args:
        engine: holds the parameters.
        pool: where memory comes from and goes to.
        swap: whether to swap; None swaps on the CPU alone.
        seed: of stochastic rounding.

    Attributes:
        worker: whose y the parameters hold; None while they hold x.
    """

    def __init__(self, engine: Engine, pool: BufferPool, swap: bool | None, seed: int) -> None:
        self.worker: int | None = None
        self._engine = engine
        self._pool = pool
        self._swap = swap
        self._seed = seed
        self._owners = StorageOwners()
        self._x: dict[int, Tensor] = {}
        self._y: dict[int, Tensor] = {}  # of swapped parameters
        self._saved: dict[int, Tensor] = {}
        self._saved_swapped: set[int] = set()
        self._saved_worker: int | None = None

    def move(
        self,
        worker: int,
        moves: Mapping[int, Tensor],
        steps: Sequence[float | Tensor],
        spent: Buffers | None,
        noise_key: tuple[int, int],
    ) -> None:
        """Move parameters from x to y.

        Args:
            worker: whose y it is.
            moves: the scaled direction by the index of the parameter.
            steps: the step of each move.
            spent: the direction's own tensors, where they are no longer needed: y is written over them, and those that
                do not fit are freed.
            noise_key: of stochastic rounding: the number of the step and that of the worker among all.
        """
        params, indices = self._engine.params(), list(moves)
        points = self._points(params, indices, spent)
        self._keep(params, (i for i in indices if i not in points))
        self.worker = worker
        displace(
            [params[i] for i in indices],
            list(moves.values()),
            steps,
            [points.get(i, params[i]) for i in indices],
            lambda place: ("rounding", self._seed, *noise_key, indices[place]),
        )
        for i, d in enumerate(spent or ()):
            if d is not None and points.get(i) is not d:
                self._pool.give(i, d)
        self._point(params, points)
        self._changed(params)

    def restore(self, keep: bool = False) -> None:
        """Put x back; without effect where the parameters hold x.

        Args:
            keep: save y for `reenter`.
        """
        if not self._x:
            self._y, self.worker = {}, None
            return
        params = self._engine.params()
        if keep:
            self._save(params)
        for i in self._y:
            if i in self._x:
                params[i].data = self._x[i]
        copied = [i for i in self._x if i not in self._y]
        copy_([params[i] for i in copied], [self._x[i] for i in copied])
        self._changed(params)
        x, y = self._x, self._y
        self._x, self._y, self.worker = {}, {}, None
        for i in copied:
            self._pool.give(i, x[i])
        for i in () if keep else y:
            self._pool.give(i, y[i])

    def reenter(self, worker: int) -> bool:
        """Move from x to the worker's saved y again, if there is one."""
        if self._saved_worker != worker:
            return False
        params, saved, swapped = self._engine.params(), self._saved, self._saved_swapped
        self._saved, self._saved_worker = {}, None
        copied = [i for i in saved if i not in swapped]
        self._keep(params, copied)
        self.worker = worker
        copy_([params[i] for i in copied], [saved[i] for i in copied])
        for i in copied:
            self._pool.give(i, saved[i])
        self._point(params, {i: y for i, y in saved.items() if i in swapped})
        self._changed(params)
        return True

    def forget(self) -> None:
        """Drop the saved extrapolated point."""
        for i, y in self._saved.items():
            self._pool.give(i, y)
        self._saved, self._saved_worker = {}, None

    def length(self) -> Tensor:
        """‖x − y‖ over all parameters that are displaced, 0-dim."""
        params = self._engine.params()
        return total_norm([x.sub(params[i]) for i, x in self._x.items()])

    def held(self) -> list[Tensor]:
        """x of the parameters that are displaced."""
        return list(self._x.values())

    def _points(self, params: Sequence[Tensor], indices: Sequence[int], spent: Buffers | None) -> dict[int, Tensor]:
        """Memory for y of the parameters that are swapped: the spent direction's own where it fits."""
        if not self._engine.may_swap or self._swap is False:
            return {}
        points: dict[int, Tensor] = {}
        can_swap = self._owners.among(params)
        for i in indices:
            p = params[i]
            if can_swap[i] and (self._swap or p.device.type == "cpu"):
                d = spent[i] if spent else None
                points[i] = d if d is not None and d.dtype == p.dtype and fits(d, p) else self._pool.take(i, p)
        return points

    def _keep(self, params: Sequence[Tensor], indices: Iterable[int]) -> None:
        """Copy x of parameters that are about to be displaced in place."""
        kept = {i: self._pool.take(i, params[i]) for i in indices}
        copy_(list(kept.values()), [params[i] for i in kept])
        self._x = kept

    def _point(self, params: Sequence[Tensor], points: Mapping[int, Tensor]) -> None:
        for i, y in points.items():
            self._y[i] = y
            self._x[i] = params[i].data
            params[i].data = y

    def _save(self, params: Sequence[Tensor]) -> None:
        if self._saved_worker == self.worker:
            # An exception came after y was saved.
            return
        self.forget()
        copied = [i for i in self._x if i not in self._y]
        saved = {i: self._pool.take(i, params[i]) for i in copied}
        copy_(list(saved.values()), [params[i] for i in copied])
        self._saved, self._saved_swapped, self._saved_worker = saved | self._y, set(self._y), self.worker

    def _changed(self, params: Sequence[Tensor]) -> None:
        # Within one autocast context a second forward pass would use the casts of the first one's weights.
        torch.clear_autocast_cache()
        # As after a move in place, a backward pass through an earlier graph is an error.
        increment_version([params[i] for i in self._y])
        self._engine.moved()


def displace(
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    steps: Sequence[float | Tensor],
    out: Sequence[Tensor],
    seed: Callable[[int], tuple[object, ...]],
) -> None:
    """y = x − step · d in one pass over memory: x and d are read, y is written.

    Most displacements of a bfloat16 parameter are below half of its last place, and rounding to nearest would lose
    them; it is rounded up or down at random, so that the expectation of y is exact. A float16 parameter is displaced in
    float32, since a step may exceed the range of float16, and rounded to nearest.

    Args:
        params: x.
        direction: d, of the same shapes.
        steps: numbers, or 0-dim tensors where reading them would synchronize with the device.
        out: where y is written: x or d themselves, or other memory of the dtype of x.
        seed: of the rounding of a parameter, by its place in the list.
    """
    for i, (p, d, step, y) in enumerate(zip(params, direction, steps, out, strict=True)):
        if isinstance(p, DTensor):
            p, d, y = held(p), held(d), held(y)
        if p.dtype in (torch.bfloat16, torch.float16):
            wide = p.float().sub_(d.float() * step)
            if p.dtype == torch.bfloat16:
                wide = stochastic_round(wide, generator_for(wide.device, *seed(i)))
            y.copy_(wide)
        elif isinstance(step, Tensor):
            torch.addcmul(p, d.to(p.dtype), step.to(p), value=-1, out=y)
        else:
            torch.add(p, d if d.dtype == p.dtype else d.to(p.dtype), alpha=-step, out=y)
