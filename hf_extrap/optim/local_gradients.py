"""The gradients of this process's workers in the step in progress."""

from __future__ import annotations

import torch
from torch import Tensor

from .buffers import Buffers, BufferStore
from .gradient_hooks import GradientHooks


class LocalGradients:
    """What the hooks copy of each worker's gradient, in units of the worker's mean loss.

    Args:
        hooks: see the gradients.
        store: holds the copies.
        dtype: of the copies; None for the gradients' own.
    """

    def __init__(self, hooks: GradientHooks, store: BufferStore, dtype: torch.dtype | None) -> None:
        self._hooks = hooks
        self._store = store
        self._dtype = dtype
        self._filled: dict[int, set[int]] = {}

    def receive(self, worker: int, size: int, scale: float) -> None:
        """Let the hooks copy, or add, the gradients of `size` parameters, multiplied by `scale`."""
        filled = self._filled.setdefault(worker, set())
        buffers = self._store.resume(worker, size) if filled else self._store.start(worker, size)
        self._hooks.into(buffers, filled, scale, self._dtype)

    def put(self, worker: int, gradients: Buffers) -> None:
        """Take a worker's gradients from elsewhere than the hooks."""
        dtype = self._dtype
        self._store[worker] = [g if g is None or dtype is None else g.to(dtype) for g in gradients]
        self._filled[worker] = {i for i, g in enumerate(gradients) if g is not None}

    def workers(self) -> list[int]:
        """Workers with gradients in this step."""
        return [worker for worker, filled in self._filled.items() if filled]

    def of(self, worker: int) -> Buffers:
        """A worker's gradients, None for a parameter without."""
        return [b if i in self._filled[worker] else None for i, b in enumerate(self._store[worker])]

    def hand_over(self, worker: int, to: BufferStore) -> None:
        """Move a worker's gradients to another store, without a copy."""
        self._store.keep_only(worker, self._filled[worker])
        to.adopt(worker, self._store)

    def spend_direction(self, worker: int, directions: BufferStore) -> None:
        """See `BufferStore.spend`: the worker's gradient takes the memory that its direction leaves."""
        directions.spend(worker, self._store)

    def held(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors on the device, and those in host memory."""
        return self._store.on_device(), self._store.on_host()

    def forget(self) -> None:
        """Start a step."""
        self._filled.clear()
        self._store.clear()
