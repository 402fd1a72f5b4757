"""Tensors of virtual workers in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .shards import held
from .spares import Spares, fits
from .transfers import Transfers

Buffers = list[Tensor | None]


@dataclass
class _Near:
    """A worker's tensors beside the parameters."""

    buffers: Buffers
    ahead: bool = False
    """Whether they have been brought and not been asked for yet."""
    agreed: list[tuple[Tensor | None, int]] = field(default_factory=list)
    """Which they were, with their versions, when the host last had them all."""

    def agree(self) -> None:
        """Note that the host has them all."""
        self.agreed = [(b, _version(b)) for b in self.buffers]

    def differs(self, index: int) -> bool:
        """Whether the host does not have this one."""
        buffer = self.buffers[index]
        if index >= len(self.agreed):
            return True
        known, version = self.agreed[index]
        return known is not buffer or version != _version(buffer)


class HostStore(MutableMapping[int, Buffers]):
    """Buffers by worker in the host's memory; those of one worker, and of one brought ahead, are beside the parameters.

    Buffers asked for may be written to until another worker's are; then what has changed goes to the host, and their
    memory is spare. With parameters on the CPU both places are the same memory, and the copies are made all the same.

    Args:
        spares: memory beside the parameters.
        leaving: the same, of what copies may still read: further copies may write to it, all else once they are joined.
        transfers: makes the copies.
    """

    def __init__(self, spares: Spares, leaving: Spares, transfers: Transfers) -> None:
        self._spares = spares
        self._leaving = leaving
        self._transfers = transfers
        self._host: dict[int, Buffers] = {}
        self._near: dict[int, _Near] = {}
        self._room: dict[int, Buffers] = {}
        self._devices: dict[int, torch.device] = {}

    def __getitem__(self, worker: int) -> Buffers:
        near = self._near.get(worker)
        if near is None and worker not in self._host:
            raise KeyError(worker)
        if near is None or near.ahead:
            self._join()
            self.put_away(but=worker)
            if near is None:
                near = self._bring(worker)
                self._join()
            near.ahead = False
        return near.buffers

    def __setitem__(self, worker: int, buffers: Buffers) -> None:
        self.put_away(but=worker)
        self._near[worker] = _Near(buffers)

    def __delitem__(self, worker: int) -> None:
        self.give_up(worker)

    def __contains__(self, worker: object) -> bool:
        return worker in self._near or worker in self._host

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._near.keys() | self._host.keys()))

    def __len__(self) -> int:
        return len(self._near.keys() | self._host.keys())

    def clear(self) -> None:
        """Forget all: the host's memory is free, and what is beside the parameters is spare."""
        if self._near:
            for worker in list(self._near):
                self._leave(worker)
            self._join()
        self._host.clear()
        self._room.clear()

    def start(self, worker: int) -> Buffers:
        """The worker's buffers, to be written in full: nothing is fetched."""
        if worker not in self._near:
            self[worker] = []
        return self[worker]

    def near(self) -> list[Tensor]:
        """What is beside the parameters now."""
        return [b for near in self._near.values() for b in near.buffers if b is not None]

    def far(self) -> list[Tensor]:
        """The host's memory, in use or not."""
        return [b for kept in (self._host, self._room) for buffers in kept.values() for b in buffers if b is not None]

    def stored(self) -> list[tuple[int, Buffers]]:
        """Each worker and its buffers in the host's memory; what is beside the parameters stays there."""
        for worker in self._near:
            self._write(worker)
        self._transfers.finish()
        return sorted(self._host.items())

    # How memory goes round

    def put_away(self, but: int | None = None) -> None:
        """Start to copy what is beside the parameters to the host, but for one worker's and what is ahead."""
        others = [w for w, near in self._near.items() if w != but and not near.ahead]
        if others:
            self._join()
        for worker in others:
            self._write(worker)
            self._leave(worker)

    def bring_ahead(self, worker: int) -> None:
        """Start to copy buffers that the host has, before they are asked for; one worker's at a time."""
        if worker not in self._near and not any(near.ahead for near in self._near.values()):
            self._bring(worker).ahead = True

    def next_after(self, worker: int) -> int | None:
        """The worker whose buffers the host has that comes first of those after this one."""
        return min((w for w in self._host if w > worker), default=None)

    def give_up(self, worker: int) -> Buffers:
        """Forget the worker; whoever asked for its buffers has their tensors now.

        Returns:
            The host's memory for them.
        """
        self._near.pop(worker, None)
        return self._host.pop(worker, []) or self._room.pop(worker, [])

    def lend(self, worker: int, room: Buffers) -> None:
        """Take the host's memory, of any content, for what the worker will have."""
        self._room[worker] = room

    def adopt(self, worker: int, other: HostStore) -> None:
        """Take the worker's buffers from another store, wherever they are."""
        if worker in self._near:
            self._leave(worker)
        self.give_up(worker)
        if worker in other._near:
            self._near[worker] = other._near.pop(worker)
        if worker in other._host:
            self._host[worker] = other._host.pop(worker)
        if worker in other._room:
            self._room[worker] = other._room.pop(worker)
        self._devices |= other._devices

    def _bring(self, worker: int) -> _Near:
        host = self._host[worker]
        near = self._near[worker] = _Near([None if h is None else self._room_near(i, h) for i, h in enumerate(host)])
        pairs = zip(near.buffers, host, strict=True)
        self._transfers.copy((held(to), held(kept)) for to, kept in pairs if to is not None and kept is not None)
        near.agree()
        return near

    def _room_near(self, index: int, kept: Tensor) -> Tensor:
        device = self._devices[index]
        left = self._leaving.find(index, kept, device=device)
        return self._spares.take(index, kept, device=device) if left is None else left

    def _write(self, worker: int) -> None:
        near = self._near[worker]
        host = self._host.setdefault(worker, self._room.pop(worker, []))
        host += [None] * (len(near.buffers) - len(host))
        pairs: list[tuple[Tensor, Tensor]] = []
        for i, buffer in enumerate(near.buffers):
            if buffer is None:
                host[i] = None
            elif near.differs(i):
                self._devices[i] = buffer.device
                kept = host[i]
                if kept is None or kept.dtype != buffer.dtype or not fits(kept, buffer, kept.device):
                    kept = host[i] = _on_host(buffer)
                pairs.append((held(kept), held(buffer)))
        self._transfers.copy(pairs)
        near.agree()

    def _leave(self, worker: int) -> None:
        for i, buffer in enumerate(self._near.pop(worker).buffers):
            self._leaving.give(i, buffer)

    def _join(self) -> None:
        self._transfers.join()
        self._spares.take_all(self._leaving)

    def __getstate__(self) -> dict[str, Any]:
        self.stored()
        return {**self.__dict__, "_near": {}, "_room": {}}


def _version(buffer: Tensor | None) -> int:
    return 0 if buffer is None else held(buffer)._version


def _on_host(tensor: Tensor) -> Tensor:
    """Memory of the host for a tensor of that kind: pinned for one on a GPU, but of a sharded one."""
    pinned = tensor.device.type == "cuda" and not isinstance(tensor, DTensor)
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned)
