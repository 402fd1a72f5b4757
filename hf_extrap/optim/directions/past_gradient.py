"""The gradient of the last step."""

from __future__ import annotations

from collections.abc import Iterator

from ..buffers import Buffers
from ..local_gradients import LocalGradients
from .base import Direction


class PastGradient(Direction):
    """g_{t−1}: in local scope each worker's own gradient, in global scope the averaged one.

    Source: Popov 1980; optimistic gradient, Daskalakis et al. 2018; per worker, Lin et al. 2020.
    """

    is_past = True

    def is_last_use(self, worker: int, compared: bool) -> bool:
        """See `Direction.is_last_use`; statistics compare the next local directions, not these."""
        return super().is_last_use(worker, compared and not self.local)

    def keeps_local_gradient(self, step: int) -> bool:
        """See `Direction.keeps_local_gradient`."""
        return self.local and self._config.is_active(step + 1)

    def keeps_averaged_gradient(self, step: int) -> bool:
        """See `Direction.keeps_averaged_gradient`."""
        return not self.local and self._config.is_active(step + 1)

    def compared(self, gradients: LocalGradients) -> Iterator[Buffers]:
        """See `Direction.compared`; in local scope the next directions, since these are spent."""
        return (gradients.of(worker) for worker in gradients.workers()) if self.local else super().compared(gradients)
