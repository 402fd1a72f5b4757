"""Buffers by worker, on the device of the parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from ..sharding import held, like
from .pool import BufferPool

Buffers = list[Tensor | None]
"""One tensor per parameter; None where there is none."""


class BufferStore(MutableMapping[int, Buffers]):
    """The buffers of each worker.

    Args:
        pool: where new tensors come from, and where free ones go.
    """

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._buffers: dict[int, Buffers] = {}

    def __getitem__(self, worker: int) -> Buffers:
        return self._buffers[worker]

    def __setitem__(self, worker: int, buffers: Buffers) -> None:
        self._buffers[worker] = buffers

    def __delitem__(self, worker: int) -> None:
        del self._buffers[worker]

    def __iter__(self) -> Iterator[int]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def stored(self) -> list[tuple[int, Buffers]]:
        """Each worker and its buffers, where they are stored, for saving."""
        return list(self._buffers.items())

    def on_device(self) -> list[Tensor]:
        """The tensors on the device of the parameters."""
        return [b for buffers in self._buffers.values() for b in buffers if b is not None]

    def on_host(self) -> list[Tensor]:
        """Host memory, in use or reserved."""
        return []

    def start(self, worker: int, size: int) -> Buffers:
        """The worker's buffers, to be written in full."""
        return padded(self._buffers.setdefault(worker, []), size)

    def resume(self, worker: int, size: int) -> Buffers:
        """The worker's buffers, to be added to."""
        return padded(self[worker], size)

    def keep_only(self, worker: int, indices: Collection[int]) -> None:
        """Drop the worker's other buffers, whose content is stale."""
        buffers = self._buffers[worker]
        for i, buffer in enumerate(buffers):
            if i not in indices:
                self._pool.give(i, buffer)
                buffers[i] = None

    def spend(self, worker: int, gradients: BufferStore) -> None:
        """Forget the worker, whose tensors the caller has taken; `gradients` is the store that its gradient goes to."""
        del self._buffers[worker]

    def adopt(self, worker: int, other: BufferStore) -> None:
        """Take the worker's buffers from another store."""
        self.drop(worker)
        self._buffers[worker] = other._buffers.pop(worker)

    def write(self, worker: int, values: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> None:
        """Copy values into the worker's buffers.

        Args:
            worker: of this process.
            values: one per parameter.
            dtype: of the copies; default: that of the values.
        """
        buffers = self.start(worker, len(values))
        for i, value in enumerate(values):
            buffer = buffers[i]
            if value is None:
                buffers[i] = None
            elif buffer is None or buffer.shape != value.shape:
                buffers[i] = self._pool.take(i, value.detach(), dtype).copy_(value)
            else:
                buffer.copy_(value)

    def replace(self, values: dict[int, Buffers]) -> None:
        """Replace all content."""
        self.clear()
        self.update(values)

    def state_dict(self) -> dict[str, Tensor]:
        """The local part of each tensor by `worker.parameter`."""
        return {
            f"{worker}.{i}": held(buffer)
            for worker, buffers in self.stored()
            for i, buffer in enumerate(buffers)
            if buffer is not None
        }

    def load_state_dict(self, state: Mapping[str, Tensor], params: Sequence[Tensor]) -> None:
        """Load what `state_dict` returned, for the same parameters."""
        loaded: dict[int, Buffers] = {}
        for name, saved in state.items():
            worker, index = (int(part) for part in name.split("."))
            buffer = like(params[index], saved.detach().to(params[index].device, copy=True))
            loaded.setdefault(worker, [None] * len(params))[index] = buffer
        self.replace(loaded)

    def drop(self, worker: int) -> None:
        """Forget the worker; its tensors are free."""
        for i, buffer in enumerate(self.pop(worker, [])):
            self._pool.give(i, buffer)

    def clear(self) -> None:
        """Forget all workers; their tensors are free."""
        for worker in list(self._buffers):
            self.drop(worker)


def padded(buffers: Buffers, size: int) -> Buffers:
    """The list, extended in place with None to `size`."""
    buffers += [None] * (size - len(buffers))
    return buffers
