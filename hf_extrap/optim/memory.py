"""The directions of this process's workers, and the gradients that may become the next ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .displacement import total_norm

Buffers = list[Tensor | None]


class DirectionMemory:
    """Buffers by worker, one a parameter, None where the parameter has no direction.

    Attributes:
        directions: d of each worker; worker 0 has that of all in global scope.
        captured: what hooks have copied of this step's own gradients, valid where `filled` says so.
        dtype: in which directions are stored; None for the gradients' own.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.directions: dict[int, Buffers] = {}
        self.captured: dict[int, Buffers] = {}
        self.filled: dict[int, set[int]] = {}

    def start_direction(self, worker: int, size: int) -> Buffers:
        """The worker's buffers for a new direction of `size` parameters, to be written in full."""
        return _of_size(self.directions, worker, size)

    def start_capture(self, worker: int, size: int) -> tuple[Buffers, set[int]]:
        """The worker's buffers for this step's gradients, and the indices that hold some already."""
        return _of_size(self.captured, worker, size), self.filled.setdefault(worker, set())

    def forget_captured(self) -> None:
        """Start a step; memory is kept."""
        for filled in self.filled.values():
            filled.clear()

    def captured_of(self, worker: int) -> Buffers:
        """This step's gradients of a worker."""
        return [b if i in self.filled[worker] else None for i, b in enumerate(self.captured[worker])]

    def captured_workers(self) -> list[int]:
        """Who has any."""
        return [worker for worker, filled in self.filled.items() if filled]

    def turn_captured_into_directions(self) -> None:
        """This step's gradients are the next one's directions; the spent ones' memory takes the next gradients.

        A gradient that is not finite, or not in `dtype`, is no direction.
        """
        for worker in self.captured_workers():
            spent = self.directions.pop(worker, [])
            gradients = self.captured_of(worker)
            if is_finite(gradients):
                self.directions[worker] = gradients
                self.captured[worker] = spent

    def store(self, worker: int, values: Sequence[Tensor | None]) -> None:
        """Copy these values as the worker's direction."""
        buffers = self.start_direction(worker, len(values))
        for i, value in enumerate(values):
            buffer = buffers[i]
            if value is None:
                buffers[i] = None
            elif buffer is None or buffer.shape != value.shape:
                buffers[i] = value.detach().to(self.dtype or value.dtype, copy=True)
            else:
                buffer.copy_(value)


def is_finite(buffers: Buffers) -> bool:
    """Whether the norm of all tensors is finite; the host waits for it."""
    return bool(torch.isfinite(total_norm([b for b in buffers if b is not None])))


def _of_size(store: dict[int, Buffers], worker: int, size: int) -> Buffers:
    buffers = store.setdefault(worker, [])
    buffers += [None] * (size - len(buffers))
    return buffers
