"""Buffers of virtual workers in host memory, and the copies to and from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..sharding import held
from .pool import BufferPool, fits
from .store import Buffers, BufferStore, padded


@dataclass
class _OnDevice:
    """A worker's tensors on the device of the parameters."""

    buffers: Buffers
    prefetched: bool = False
    """Whether they have been copied from the host and not been read yet."""
    synced: list[tuple[Tensor | None, int]] = field(default_factory=list)
    """The tensors and their versions when the host last had the same content."""

    def mark_synced(self) -> None:
        """The host has the content of all buffers."""
        self.synced = [(b, _version(b)) for b in self.buffers]

    def is_dirty(self, index: int) -> bool:
        """Whether the host does not have the content of this buffer."""
        buffer = self.buffers[index]
        if index >= len(self.synced):
            return True
        known, version = self.synced[index]
        return known is not buffer or version != _version(buffer)


class OffloadedStore(BufferStore):
    """Buffers by worker in host memory. Those of the current worker, and of one prefetched, are on the device.

    Reading another worker's buffers writes what has changed back to the host and frees the device memory. With
    parameters on the CPU both memories are the same, and the copies are made all the same.

    Args:
        pool: of device memory.
        leaving: pool of device memory that copies may still read: other copies may write to it at once, computation
            after `Transfers.join`.
        transfers: makes the copies.
    """

    def __init__(self, pool: BufferPool, leaving: BufferPool, transfers: Transfers) -> None:
        super().__init__(pool)
        self._leaving = leaving
        self._transfers = transfers
        self._device: dict[int, _OnDevice] = {}
        self._host: dict[int, Buffers] = {}
        self._reserved: dict[int, Buffers] = {}
        self._devices: dict[int, torch.device] = {}

    def __getitem__(self, worker: int) -> Buffers:
        near = self._device.get(worker)
        if near is None and worker not in self._host:
            raise KeyError(worker)
        if near is None or near.prefetched:
            self._join()
            self._evict(but=worker)
            if near is None:
                near = self._fetch(worker)
                self._join()
            near.prefetched = False
        return near.buffers

    def __setitem__(self, worker: int, buffers: Buffers) -> None:
        self._evict(but=worker)
        self._device[worker] = _OnDevice(buffers)

    def __delitem__(self, worker: int) -> None:
        self._release(worker)

    def __contains__(self, worker: object) -> bool:
        return worker in self._device or worker in self._host

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._device.keys() | self._host.keys()))

    def __len__(self) -> int:
        return len(self._device.keys() | self._host.keys())

    def stored(self) -> list[tuple[int, Buffers]]:
        """See `BufferStore.stored`: the host's copies; what is on the device stays there."""
        for worker in self._device:
            self._write_back(worker)
        self._transfers.finish()
        return sorted(self._host.items())

    def on_device(self) -> list[Tensor]:
        """See `BufferStore.on_device`."""
        return [b for near in self._device.values() for b in near.buffers if b is not None]

    def on_host(self) -> list[Tensor]:
        """See `BufferStore.on_host`."""
        kept = [*self._host.values(), *self._reserved.values()]
        return [b for buffers in kept for b in buffers if b is not None]

    def start(self, worker: int, size: int) -> Buffers:
        """See `BufferStore.start`; nothing is fetched."""
        if worker not in self._device:
            self[worker] = []
        return padded(self[worker], size)

    def keep_only(self, worker: int, indices: Collection[int]) -> None:
        """See `BufferStore.keep_only`."""
        near = self._device[worker].buffers if worker in self._device else []
        for buffers in (near, self._host.get(worker, [])):
            buffers[:] = [b if i in indices else None for i, b in enumerate(buffers)]

    def spend(self, worker: int, gradients: BufferStore) -> None:
        """See `BufferStore.spend`; the worker's gradient will be offloaded to its direction's host memory.

        The gradient of the previous worker is offloaded now, and the next worker's direction is prefetched: after the
        last worker the first one's gradient, which is its next direction.
        """
        assert isinstance(gradients, OffloadedStore)
        gradients._reserved[worker] = self._release(worker)
        gradients._evict()
        if (following := self._first_after(worker)) is not None:
            self._prefetch(following)
        elif (first := gradients._first_after(-1)) is not None:
            gradients._prefetch(first)

    def adopt(self, worker: int, other: BufferStore) -> None:
        """See `BufferStore.adopt`; the buffers stay where they are, on the device or the host."""
        assert isinstance(other, OffloadedStore)
        if worker in self._device:
            self._leave(worker)
        self._release(worker)
        for mine, others in (
            (self._host, other._host),
            (self._reserved, other._reserved),
        ):
            if worker in others:
                mine[worker] = others.pop(worker)
        if worker in other._device:
            self._device[worker] = other._device.pop(worker)
        self._devices |= other._devices

    def clear(self) -> None:
        """See `BufferStore.clear`; host memory is released."""
        if self._device:
            for worker in list(self._device):
                self._leave(worker)
            self._join()
        self._host.clear()
        self._reserved.clear()

    def _evict(self, but: int | None = None) -> None:
        """Start to copy buffers on the device to the host, except one worker's and prefetched ones."""
        others = [w for w, near in self._device.items() if w != but and not near.prefetched]
        if others:
            self._join()
        for worker in others:
            self._write_back(worker)
            self._leave(worker)

    def _prefetch(self, worker: int) -> None:
        """Start to copy a worker's buffers to the device, unless another prefetch is pending."""
        if worker not in self._device and not any(near.prefetched for near in self._device.values()):
            self._fetch(worker).prefetched = True

    def _first_after(self, worker: int) -> int | None:
        """The first worker after this one whose buffers are in host memory."""
        return min((w for w in self._host if w > worker), default=None)

    def _release(self, worker: int) -> Buffers:
        """Forget the worker, and return its host memory."""
        self._device.pop(worker, None)
        return self._host.pop(worker, []) or self._reserved.pop(worker, [])

    def _fetch(self, worker: int) -> _OnDevice:
        host = self._host[worker]
        near = self._device[worker] = _OnDevice([None if h is None else self._room(i, h) for i, h in enumerate(host)])
        pairs = zip(near.buffers, host, strict=True)
        self._transfers.copy((held(to), held(kept)) for to, kept in pairs if to is not None and kept is not None)
        near.mark_synced()
        return near

    def _room(self, index: int, kept: Tensor) -> Tensor:
        device = self._devices[index]
        left = self._leaving.find(index, kept, device=device)
        return self._pool.take(index, kept, device=device) if left is None else left

    def _write_back(self, worker: int) -> None:
        near = self._device[worker]
        host = padded(self._host.setdefault(worker, self._reserved.pop(worker, [])), len(near.buffers))
        pairs: list[tuple[Tensor, Tensor]] = []
        for i, buffer in enumerate(near.buffers):
            if buffer is None:
                host[i] = None
            elif near.is_dirty(i):
                self._devices[i] = buffer.device
                kept = host[i]
                if kept is None or kept.dtype != buffer.dtype or not fits(kept, buffer, kept.device):
                    kept = host[i] = _on_host(buffer)
                pairs.append((held(kept), held(buffer)))
        self._transfers.copy(pairs)
        near.mark_synced()

    def _leave(self, worker: int) -> None:
        for i, buffer in enumerate(self._device.pop(worker).buffers):
            self._leaving.give(i, buffer)

    def _join(self) -> None:
        self._transfers.join()
        self._pool.take_all(self._leaving)


class Transfers:
    """Copies between host and device, in order, on a CUDA stream of their own.

    A copy waits for all computation issued before it. Computation may use the memory after `join`, the host after
    `finish`, a later copy at once. Without CUDA, copies are synchronous.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._running: set[torch.device] = set()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start to copy: each pair is (target, source)."""
        started: set[torch.device] = set()
        for to, source in pairs:
            near = source if to.device.type == "cpu" else to
            if near.device.type != "cuda":
                to.copy_(source)
                continue
            stream = self._stream(near.device)
            if near.device not in started:
                stream.wait_stream(torch.cuda.current_stream(near.device))
                started.add(near.device)
            with torch.cuda.stream(stream):
                to.copy_(source, non_blocking=True)
            # The caching allocator must not reuse the memory before the copy has ended.
            near.record_stream(stream)
        self._running |= started

    def join(self) -> None:
        """Let computation issued from now on wait for all copies."""
        for device in self._running:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])
        self._running.clear()

    def finish(self) -> None:
        """Let the host wait for all copies."""
        for stream in self._streams.values():
            stream.synchronize()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _version(buffer: Tensor | None) -> int:
    return 0 if buffer is None else held(buffer)._version


def _on_host(tensor: Tensor) -> Tensor:
    """Host memory for a tensor of this kind: pinned for CUDA, except for sharded tensors."""
    pinned = tensor.device.type == "cuda" and not isinstance(tensor, DTensor)
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned)
