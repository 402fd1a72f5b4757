"""The scale of the loss in float16, which directions are free of."""

from __future__ import annotations

import torch

from .engines.base import Engine


class LossScale:
    """The scale of a `GradScaler` times that of the engine.

    Args:
        engine: may scale the loss itself.
        grad_scaler: the one in use, if any.
    """

    def __init__(self, engine: Engine, grad_scaler: torch.amp.GradScaler | None) -> None:
        self._engine = engine
        self._scaler = grad_scaler
        self._first: float | None = None

    def current(self) -> float:
        """The scale now; 1 without scaling."""
        scaler = self._scaler
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        return scale * self._engine.loss_scale

    def note(self) -> None:
        """Note the scale at the start of the step."""
        if self._first is None:
            self._first = self.current()

    def has_dropped(self) -> bool:
        """Whether the scale is smaller than at the start of the step: the step overflowed."""
        return self._first is not None and self.current() < self._first

    def forget(self) -> None:
        """Start a step."""
        self._first = None
