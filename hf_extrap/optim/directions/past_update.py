"""The last update of x."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..buffers import Buffers
from ..step_size import learning_rate
from .base import Direction


class PastUpdate(Direction):
    """(x_{t−1} − x_t) / lr: the base optimizer's own, preconditioned direction, the same for all workers.

    With scaling `norm` and a fixed step size this is Momentum-SAM (Becker, Altrock and Risse, arXiv:2401.12033).
    """

    is_past = True

    def keeps_update(self, step: int) -> bool:
        """See `Direction.keeps_update`."""
        return self._config.is_active(step + 1)

    def keep_update(self, difference: dict[int, Tensor], stepped: Sequence[bool]) -> None:
        """See `Direction.keep_update`; written over the difference."""
        update: Buffers = []
        for options, params in self._engine.groups():
            rate = learning_rate(options)
            for _ in params:
                change = difference.get(len(update))
                keeps = change is not None and stepped[len(update)] and rate != 0
                update.append(change.div_(rate) if keeps and change is not None else None)
        if self.dtype is not None:
            self.store.write(0, update, self.dtype)
        else:
            self.store.drop(0)
            self.store[0] = update
