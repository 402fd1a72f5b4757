"""Copies between the host's memory and the parameters', while the device computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Transfers:
    """Copies in the order in which they are asked for, on a CUDA device on a stream of their own.

    A copy comes after everything that the device has been given to compute before it. What is computed after it may
    read what it writes, or write what it reads, once it has been joined, and the host may once it has been finished; a
    later copy may at once. Without a CUDA device copies are made on the spot.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._running: set[torch.device] = set()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start to copy, to the first tensor of each pair from the second."""
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
            # Whoever lets go of the tensor early does not give its memory to another before the copy has ended.
            near.record_stream(stream)
        self._running |= started

    def join(self) -> None:
        """What the device is given to compute from now on comes after all copies."""
        for device in self._running:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])
        self._running.clear()

    def finish(self) -> None:
        """Let the host wait until all copies have ended."""
        for stream in self._streams.values():
            stream.synchronize()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def __reduce__(self) -> tuple[type[Transfers], tuple[()]]:
        """Saved as nothing: streams belong to a process."""
        return type(self), ()
