"""The directions of this process's workers, and the gradients that may become the next ones."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import Tensor

from .displacement import total_norm
from .host_store import Buffers, HostStore
from .spares import Spares
from .transfers import Transfers


class DirectionMemory:
    """Buffers by worker, one a parameter, None where the parameter has no direction.

    Args:
        dtype: in which directions are stored; None for the gradients' own.
        on_host: keep them in the host's memory: K tensors of each parameter for K > 1 workers with past directions.
            Beside the parameters are three: x or y, the gradient of the worker in turn, and that of the worker before
            it, which leaves while it runs and makes room for the direction of the next.

    Attributes:
        directions: d of each worker; worker 0 has that of all in global scope. With `on_host` what was asked for is
            valid until another worker's is asked for; so it is with `captured`.
        captured: what hooks have copied of this step's own gradients, valid where `filled` says so.
        spent: workers whose direction has given its memory away in this step.
        spares: the memory that circulates between directions, gradients, x and y: K + 1 tensors of each parameter for K
            workers with past directions.
    """

    def __init__(self, dtype: torch.dtype | None, on_host: bool = False) -> None:
        self.dtype = dtype
        self.spares = Spares()
        self._directions: MutableMapping[int, Buffers] = {}
        self.captured: MutableMapping[int, Buffers] = {}
        if on_host:
            leaving, transfers = Spares(), Transfers()
            self._directions = HostStore(self.spares, leaving, transfers)
            self.captured = HostStore(self.spares, leaving, transfers)
        self.filled: dict[int, set[int]] = {}
        self.spent: set[int] = set()

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
        store = self._directions
        return iter(store.stored() if isinstance(store, HostStore) else store.items())

    def start_direction(self, worker: int, size: int) -> Buffers:
        """The worker's buffers for a new direction of `size` parameters, to be written in full."""
        return _blank(self._directions, worker, size)

    def start_capture(self, worker: int, size: int) -> tuple[Buffers, set[int]]:
        """The worker's buffers for this step's gradients, and the indices that hold some already."""
        filled = self.filled.setdefault(worker, set())
        return (_of_size if filled else _blank)(self.captured, worker, size), filled

    def spend(self, worker: int) -> None:
        """The worker's direction has been used for the last time: whoever asked for it has its tensors now.

        Its memory on the host takes the worker's gradient. Now the gradient of the worker before goes to the host, and
        the next worker's direction comes: after the last worker the first one's gradient, its next direction.
        """
        self.spent.add(worker)
        directions, captured = self._directions, self.captured
        if not (isinstance(directions, HostStore) and isinstance(captured, HostStore)):
            del directions[worker]
            return
        captured.lend(worker, directions.give_up(worker))
        captured.put_away()
        if (following := directions.next_after(worker)) is not None:
            directions.bring_ahead(following)
        elif (first := captured.next_after(-1)) is not None:
            captured.bring_ahead(first)

    def drop(self, worker: int) -> None:
        """Forget the worker's direction; its memory is spare."""
        self._give(self._directions.pop(worker))

    def drop_directions(self) -> None:
        """Forget all directions; their memory is spare."""
        self._clear(self._directions)

    def forget_captured(self) -> None:
        """Start a step; memory is kept."""
        self.spent.clear()
        self.filled.clear()
        self._clear(self.captured)

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
            if self.dtype == torch.float16 and not is_finite(self.captured_of(worker)):
                self._directions.pop(worker, None)
            elif isinstance(self._directions, HostStore) and isinstance(self.captured, HostStore):
                self._directions.adopt(worker, self.captured)
            else:
                self._give(self._directions.pop(worker, []))
                self._directions[worker] = self.captured_of(worker)
                del self.captured[worker]

    def take_over(self, worker: int, values: Buffers) -> None:
        """Make these tensors, which nobody else writes to, the worker's direction, without a copy where it can be."""
        if self.dtype is not None:
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

    def _clear(self, store: MutableMapping[int, Buffers]) -> None:
        for buffers in () if isinstance(store, HostStore) else store.values():
            self._give(buffers)
        store.clear()

    def _give(self, buffers: Buffers) -> None:
        for i, buffer in enumerate(buffers):
            self.spares.give(i, buffer)


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
