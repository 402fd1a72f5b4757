"""The directions of this process's workers, and the gradients that may become the next ones."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .displacement import total_norm
from .spares import Spares

Buffers = list[Tensor | None]


class DirectionMemory:
    """Buffers by worker, one a parameter, None where the parameter has no direction.

    Args:
        dtype: in which directions are stored; None for the gradients' own.
        on_host: keep them in the host's memory, with those of one worker at a time beside the parameters.

    Attributes:
        directions: d of each worker; worker 0 has that of all in global scope.
        captured: what hooks have copied of this step's own gradients, valid where `filled` says so.
        spent: workers whose direction has given its memory away in this step.
        spares: the memory that circulates between directions, gradients, x and y: K + 1 tensors of each parameter for K
            workers with past directions.
    """

    def __init__(self, dtype: torch.dtype | None, on_host: bool = False) -> None:
        self.dtype = dtype
        self.on_host = on_host
        self._directions: MutableMapping[int, Buffers] = HostStore() if on_host else {}
        self.captured: MutableMapping[int, Buffers] = HostStore() if on_host else {}
        self.filled: dict[int, set[int]] = {}
        self.spent: set[int] = set()
        self.spares = Spares()

    @property
    def directions(self) -> MutableMapping[int, Buffers]:
        """See the attributes."""
        return self._directions

    @directions.setter
    def directions(self, values: MutableMapping[int, Buffers]) -> None:
        self._directions.clear()
        self._directions.update(values)

    def at_rest(self) -> Iterator[tuple[int, Buffers]]:
        """Each worker and its direction, where it is stored."""
        return self._directions.stored() if isinstance(self._directions, HostStore) else iter(self._directions.items())

    def start_direction(self, worker: int, size: int) -> Buffers:
        """The worker's buffers for a new direction of `size` parameters, to be written in full."""
        return _blank(self._directions, worker, size)

    def start_capture(self, worker: int, size: int) -> tuple[Buffers, set[int]]:
        """The worker's buffers for this step's gradients, and the indices that hold some already."""
        filled = self.filled.setdefault(worker, set())
        return (_of_size if filled else _blank)(self.captured, worker, size), filled

    def spend(self, worker: int) -> None:
        """The worker's direction has been used for the last time: whoever asked for it has its tensors now."""
        del self._directions[worker]
        self.spent.add(worker)

    def drop(self, worker: int) -> None:
        """Forget the worker's direction; its memory is spare."""
        self._give(self._directions.pop(worker))

    def drop_directions(self) -> None:
        """Forget all directions; their memory is spare."""
        for buffers in () if self.on_host else self._directions.values():
            self._give(buffers)
        self._directions.clear()

    def forget_captured(self) -> None:
        """Start a step; memory is kept."""
        self.spent.clear()
        for worker, filled in self.filled.items():
            filled.clear()
            if not self.on_host:
                self._give(self.captured.pop(worker, []))

    def captured_of(self, worker: int) -> Buffers:
        """This step's gradients of a worker."""
        return [b if i in self.filled[worker] else None for i, b in enumerate(self.captured[worker])]

    def captured_workers(self) -> list[int]:
        """Who has any."""
        return [worker for worker, filled in self.filled.items() if filled]

    def turn_captured_into_directions(self) -> None:
        """This step's gradients are the next one's directions; the spent ones' memory takes the next gradients.

        The averaged gradient was finite, so that they are too; but what float16 cannot hold is no direction.
        """
        for worker in self.captured_workers():
            gradients = self.captured_of(worker)
            if self.dtype == torch.float16 and not is_finite(gradients):
                self._directions.pop(worker, None)
            elif isinstance(self._directions, HostStore) and isinstance(self.captured, HostStore):
                self._directions.swap(worker, self.captured, self.filled[worker])
            else:
                self._give(self._directions.pop(worker, []))
                self._directions[worker] = gradients
                del self.captured[worker]

    def take_over(self, worker: int, values: Buffers) -> None:
        """Make these tensors, which nobody else writes to, the worker's direction, without a copy where it can be."""
        if self.on_host or self.dtype is not None:
            self.store(worker, values)
            return
        self._give(self._directions.pop(worker, []))
        self._directions[worker] = values

    def store(self, worker: int, values: Sequence[Tensor | None]) -> None:
        """Copy these values as the worker's direction."""
        buffers = self.start_direction(worker, len(values))
        for i, value in enumerate(values):
            buffer = buffers[i]
            if value is None:
                buffers[i] = None
            elif buffer is None or buffer.shape != value.shape:
                buffers[i] = self.spares.take(i, value.detach(), self.dtype).copy_(value)
            else:
                buffer.copy_(value)

    def _give(self, buffers: Buffers) -> None:
        for i, buffer in enumerate(buffers):
            self.spares.give(i, buffer)


class HostStore(MutableMapping[int, Buffers]):
    """Buffers by worker in the host's memory; those of the worker asked for last are beside the parameters too.

    What is changed there is written back before another worker's buffers come. With parameters on the CPU both places
    are the same memory, and the copies are made all the same.
    """

    def __init__(self) -> None:
        self._host: dict[int, Buffers] = {}
        self._devices: dict[int, torch.device] = {}
        self._near: Buffers = []
        self._near_worker: int | None = None
        self._written: list[tuple[int, int]] = []
        """Of each near buffer, which it was and its version when it last agreed with the host's."""

    def __getitem__(self, worker: int) -> Buffers:
        if worker != self._near_worker:
            kept = self._host[worker]
            self._put_away()
            self._near = [None if h is None else self._fetch(i, h) for i, h in enumerate(kept)]
            self._near_worker = worker
            self._agree()
        return self._near

    def __setitem__(self, worker: int, buffers: Buffers) -> None:
        if worker != self._near_worker:
            self._put_away()
        self._host.setdefault(worker, [])
        self._near, self._near_worker, self._written = buffers, worker, []

    def __delitem__(self, worker: int) -> None:
        del self._host[worker]
        if worker == self._near_worker:
            self._near_worker = None

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._host))

    def __len__(self) -> int:
        return len(self._host)

    def clear(self) -> None:
        """Forget all, and free the host's memory."""
        self._host.clear()
        self._near, self._near_worker = [], None

    @property
    def near(self) -> Buffers:
        """What is beside the parameters now, in use or not."""
        return self._near

    def start(self, worker: int) -> Buffers:
        """The worker's buffers with any content, to be written in full: nothing is fetched."""
        self[worker] = self._near if worker == self._near_worker else self._last_near()
        return self._near

    def stored(self) -> Iterator[tuple[int, Buffers]]:
        """Each worker and its buffers in the host's memory."""
        self._put_away()
        return iter(self._host.items())

    def swap(self, worker: int, other: HostStore, indices: set[int]) -> None:
        """Take the worker's buffers at these indices from the other store, and give it this one's memory for them."""
        for store in (self, other):
            if store._near_worker == worker:
                store._put_away()
        spent = self._host.pop(worker, [])
        self._host[worker] = [b if i in indices else None for i, b in enumerate(other._host[worker])]
        self._devices |= other._devices
        other._host[worker] = spent

    def _last_near(self) -> Buffers:
        self._put_away()
        return self._near

    def _put_away(self) -> None:
        """Write what has changed beside the parameters to the host; the near memory is free for another worker."""
        if self._near_worker is None:
            return
        host = self._host[self._near_worker]
        host += [None] * (len(self._near) - len(host))
        for i, near in enumerate(self._near):
            if near is None:
                host[i] = None
                continue
            if i < len(self._written) and self._written[i] == (id(near), near._version):
                continue
            self._devices[i] = near.device
            kept = host[i]
            if kept is None or kept.shape != near.shape or kept.dtype != near.dtype:
                kept = host[i] = _on_host(near)
            kept.copy_(near)
        self._near_worker = None

    def _agree(self) -> None:
        self._written = [(0, 0) if b is None else (id(b), b._version) for b in self._near]

    def _fetch(self, index: int, kept: Tensor) -> Tensor:
        return kept.to(self._devices[index], copy=True)


def _on_host(tensor: Tensor) -> Tensor:
    """Memory of the host for a tensor of that kind: pinned for one on a GPU, but of a sharded one."""
    if isinstance(tensor, DTensor):
        return tensor.to("cpu", copy=True)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")


def is_finite(buffers: Buffers) -> bool:
    """Whether the norm of all tensors is finite; the host waits for it."""
    return bool(torch.isfinite(total_norm([b for b in buffers if b is not None])))


def _blank(store: MutableMapping[int, Buffers], worker: int, size: int) -> Buffers:
    buffers = store.start(worker) if isinstance(store, HostStore) else store.setdefault(worker, [])
    buffers += [None] * (size - len(buffers))
    return buffers


def _of_size(store: MutableMapping[int, Buffers], worker: int, size: int) -> Buffers:
    buffers = store.setdefault(worker, [])
    buffers += [None] * (size - len(buffers))
    return buffers
