"""η: how far to look, from the learning rate or from the curvature measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import ExtrapConfig

COLD_RATIO = 0.1
"""Share of the learning rate that `auto` starts with, before it has measured any curvature."""
SMOOTHING = 0.9
"""Weight of the past in the moving average of the curvature."""


class StepSize:
    """The extrapolation step size of each parameter group, and the state that it needs.

    Attributes:
        peak_lr: the largest learning rate of each group so far (a scheduler's `initial_lr` counts as seen).
        curvature: L̂ by worker, tensors of no dimension: ‖g(y) − g(x)‖ / ‖y − x‖, smoothed over steps.
    """

    def __init__(self, config: ExtrapConfig) -> None:
        self.config = config
        self.peak_lr: list[float] = []
        self.curvature: dict[int, Tensor] = {}

    def follow(self, groups: list[dict[str, Any]]) -> None:
        """Take note of the learning rates that this step uses."""
        if self.config.direction == "none" or not (self.config.anneals or self.config.step_size == "auto"):
            return
        self.peak_lr += [0.0] * (len(groups) - len(self.peak_lr))
        for i, group in enumerate(groups):
            if self.config.step_size == "auto" or group.get("lr") is not None:
                self.peak_lr[i] = max(self.peak_lr[i], self.learning_rate(group), float(group.get("initial_lr") or 0))

    def of_group(self, index: int, group: dict[str, Any], worker: int) -> float | Tensor:
        """η of one parameter group, negative for ascent.

        Raises:
            ValueError: where a learning rate is needed and the base optimizer keeps none.
        """
        config = self.config
        sign = -1.0 if config.ascent else 1.0
        if config.step_ratio is not None:
            return sign * config.step_ratio * self.learning_rate(group)
        annealed = sign
        if config.anneals and group.get("lr") is not None and self.peak_lr[index] > 0:
            annealed *= self.learning_rate(group) / self.peak_lr[index]
        if config.step_size != "auto":
            return annealed * float(config.step_size or 0.0)
        cold = sign * COLD_RATIO * self.learning_rate(group)
        if worker not in self.curvature:
            return cold
        curvature = self.curvature[worker]
        return torch.where(curvature > 0, annealed * config.curvature_share / curvature, cold)

    def measure(self, worker: int, gradient_change: Tensor, displacement: Tensor) -> None:
        """Smooth ‖g(y) − g(x)‖ / ‖y − x‖ into L̂; a measurement that is zero or not finite is left out."""
        measured = gradient_change / displacement
        usable = torch.isfinite(measured) & (measured > 0)
        before = self.curvature.get(worker, torch.zeros_like(measured)).to(measured)
        smoothed = torch.where(before > 0, SMOOTHING * before + (1 - SMOOTHING) * measured, measured)
        self.curvature[worker] = torch.where(usable, smoothed, before)

    def learning_rate(self, group: Mapping[str, Any]) -> float:
        """The group's learning rate as a number."""
        if group.get("lr") is None:
            raise ValueError(
                "the base optimizer keeps no learning rate (lr is None), which step_ratio and step_size 'auto' need; "
                "give a numeric step_size, or give the base optimizer a learning rate."
            )
        return float(group["lr"])
