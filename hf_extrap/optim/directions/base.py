"""What a direction is: which gradients and steps it keeps, and what it gives a worker."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..buffers import Buffers, BufferStore, padded
from ..config import ExtrapConfig
from ..engines.base import Engine
from ..foreach import is_finite
from ..local_gradients import LocalGradients

logger = logging.getLogger(__name__)


class Direction:
    """The extrapolation direction d of each worker of this process. This base class has none, and never moves x.

    A direction that is not `local` is shared by all workers, under the number 0. Steps are counted from 0.

    Args:
        config: the scheme.
        engine: holds the parameters.
        store: holds the directions.

    Attributes:
        local: whether each worker has its own.
        is_fresh: whether every step needs a gradient at x.
        is_past: whether the direction is kept from the last step.
        store: holds the directions between steps.
    """

    is_fresh = False
    is_past = False

    def __init__(self, config: ExtrapConfig, engine: Engine, store: BufferStore) -> None:
        self.local = config.is_local
        self.store = store
        self.dtype: torch.dtype | None = getattr(torch, config.direction_dtype) if config.direction_dtype else None
        self._config = config
        self._engine = engine
        self._spent: set[int] = set()
        self._starts_cold = False

    # Before the gradient at y

    def of(self, worker: int, step: int) -> Buffers:
        """d of a worker, one tensor per parameter; empty while there is none yet."""
        if worker not in self.store and self._starts_cold and step > 0:
            logger.warning("the checkpoint has no direction for this worker: its first step does not extrapolate")
        self._starts_cold = False
        return padded(self.store[worker], len(self._engine.params())) if worker in self.store else []

    def is_last_use(self, worker: int, compared: bool) -> bool:
        """Whether the tensors of d are free once y is known.

        Args:
            worker: of this process.
            compared: whether statistics compare directions with the gradient after the step.
        """
        return worker in self.store and not compared

    def check_unspent(self, worker: int) -> None:
        """Raise a RuntimeError if the worker's direction has been used for the last time in this step."""
        if worker in self._spent:
            raise RuntimeError(
                f"worker {worker} has left its extrapolated point, and its direction is spent; allowed: all "
                "micro-batches of one virtual worker before those of the next."
            )

    def spend(self, worker: int, gradients: LocalGradients) -> None:
        """Forget the worker's direction, whose tensors have been used for y."""
        self._spent.add(worker)
        gradients.spend_direction(worker, self.store)

    def put(self, worker: int, gradient: Buffers) -> None:
        """Take a worker's fresh gradient as its direction, in the units of its mean loss."""
        self.store[worker] = [None if g is None else g.to(self.dtype or g.dtype) for g in gradient]

    # During and after the step

    def keeps_local_gradient(self, step: int) -> bool:
        """Whether each worker's gradient of this step is its next direction."""
        return False

    def keeps_averaged_gradient(self, step: int) -> bool:
        """Whether the averaged gradient of this step is the next direction."""
        return False

    def keeps_update(self, step: int) -> bool:
        """Whether the difference of x over this step is the next direction."""
        return False

    def keep_averaged_gradient(self, step: int, gradients: Sequence[Tensor | None]) -> None:
        """See the averaged gradient of a step, before the base optimizer steps with it."""
        if self.keeps_averaged_gradient(step):
            self.store.write(0, gradients, self.dtype)

    def keep_local_gradients(self, step: int, gradients: LocalGradients) -> None:
        """See the workers' own gradients, after the step."""
        if not self.keeps_local_gradient(step):
            return
        for worker in gradients.workers():
            if self.dtype == torch.float16 and not is_finite(gradients.of(worker)):
                self.store.pop(worker, None)
            else:
                gradients.hand_over(worker, self.store)

    def keep_update(self, difference: dict[int, Tensor], stepped: Sequence[bool]) -> None:
        """See x before the step minus x after it, where `keeps_update` asks for it; the tensors are handed over."""

    def compared(self, gradients: LocalGradients) -> Iterator[Buffers]:
        """The directions that statistics compare with the averaged gradient, each valid until the next one."""
        return iter(self.store.values())

    def end_step(self, step: int) -> None:
        """Forget directions that the next step does not use."""
        if not (self.is_past and self._config.is_active(step + 1)):
            self.store.clear()

    def forget_step(self) -> None:
        """Start a step."""
        self._spent.clear()

    def start_cold(self, warn: bool) -> None:
        """Forget all directions.

        Args:
            warn: whether the next step warns of it, where a checkpoint should have had some.
        """
        self.store.replace({})
        self._starts_cold = warn and self.is_past
