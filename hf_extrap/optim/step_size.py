"""The extrapolation step size η: a number, a ratio of the learning rate, or from the measured curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import ExtrapConfig
from .foreach import norms

COLD_RATIO = 0.1
"""Share of the learning rate that `auto` starts with, before it has measured the curvature."""
SMOOTHING = 0.9
"""Weight of the past in the moving average of the curvature."""

Group = Mapping[str, Any]
Steps = Sequence[float | Tensor] | Tensor


class StepSize:
    """η as a number, which follows the learning rate if `anneal` is true: η · lr / peak lr.

    Attributes:
        peak_lr: the largest learning rate of each parameter group so far; a scheduler's `initial_lr` counts as seen.
        curvature: L̂ by worker, 0-dim, of `AutoStepSize`; else empty.
    """

    def __init__(self, config: ExtrapConfig) -> None:
        self.peak_lr: list[float] = []
        self.curvature: dict[int, Tensor] = {}
        self._config = config
        self._sign = -1.0 if config.ascent else 1.0

    def needs_probe(self, step: int) -> bool:
        """Whether this step compares the gradients at x and at y."""
        return False

    def follow(self, groups: Sequence[Group]) -> None:
        """Note the learning rates of this step."""
        if self._config.anneals and self._config.direction != "none":
            self._note_peaks(groups)

    def of_group(self, index: int, group: Group, worker: int) -> float | Tensor:
        """η of a parameter group, negative for ascent.

        Raises:
            ValueError: where a learning rate is needed and the base optimizer has none.
        """
        return self._annealed(index, group) * float(self._config.step_size or 0.0)

    def steps(
        self,
        worker: int,
        groups: Sequence[tuple[Group, Sequence[Tensor]]],
        moves: Mapping[int, Tensor],
        factors: Tensor | None,
        last_step: Tensor | None,
    ) -> tuple[list[float | Tensor], float | Tensor]:
        """The step of each move: η times its factor, capped by `max_displacement`.

        Args:
            worker: of this process.
            groups: options and parameters of each group.
            moves: scaled directions by the index of the parameter.
            factors: of the scaling, one per move; None for 1.
            last_step: ‖Δx‖ of each parameter's last step, if there was one.

        Returns:
            One step per move, and η of the first one for the logs.
        """
        sizes: list[float | Tensor] = []
        start = 0
        for index, (options, params) in enumerate(groups):
            size = self.of_group(index, options, worker)
            sizes += [size for i in range(start, start + len(params)) if i in moves]
            start += len(params)
        steps, first = sizes if factors is None else _products(sizes, factors), sizes[0]
        if (share := self._config.max_displacement) is not None and last_step is not None:
            length = length_of(moves, steps)
            longest = share * torch.linalg.vector_norm(last_step).to(length)
            factor = (longest / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1)
            steps, first = _products(steps, factor.expand(len(steps))), first * factor
        return _readable(steps), first

    def _annealed(self, index: int, group: Group) -> float:
        """The sign of η, times lr / peak lr where it anneals."""
        if self._config.anneals and group.get("lr") is not None and self.peak_lr[index] > 0:
            return self._sign * (learning_rate(group) / self.peak_lr[index])
        return self._sign

    def _note_peaks(self, groups: Sequence[Group], must_have_rate: bool = False) -> None:
        self.peak_lr += [0.0] * (len(groups) - len(self.peak_lr))
        for i, group in enumerate(groups):
            if must_have_rate or group.get("lr") is not None:
                self.peak_lr[i] = max(self.peak_lr[i], learning_rate(group), float(group.get("initial_lr") or 0))


class RatioStepSize(StepSize):
    """η as a ratio of the current learning rate."""

    def of_group(self, index: int, group: Group, worker: int) -> float | Tensor:
        """See `StepSize.of_group`."""
        return self._sign * float(self._config.step_ratio or 0.0) * learning_rate(group)


class AutoStepSize(StepSize):
    """η = c / L̂, where L̂ is the curvature along the direction, measured where a step has gradients at x and at y.

    Source: the step size of adaptive extragradient methods (Bach and Levy 2019), with c below 1.
    """

    def needs_probe(self, step: int) -> bool:
        """See `StepSize.needs_probe`."""
        return self._config.is_fresh or step % self._config.probe_every == 0

    def follow(self, groups: Sequence[Group]) -> None:
        """See `StepSize.follow`."""
        self._note_peaks(groups, must_have_rate=True)

    def of_group(self, index: int, group: Group, worker: int) -> float | Tensor:
        """See `StepSize.of_group`."""
        annealed = self._annealed(index, group)
        cold = self._sign * COLD_RATIO * learning_rate(group)
        if worker not in self.curvature:
            return cold
        curvature = self.curvature[worker]
        return torch.where(curvature > 0, annealed * self._config.curvature_share / curvature, cold)

    def measure(self, worker: int, gradient_change: Tensor, distance: Tensor) -> None:
        """Smooth ‖g(y) − g(x)‖ / ‖y − x‖ into L̂; a measurement that is zero or not finite is left out."""
        measured = gradient_change / distance
        usable = torch.isfinite(measured) & (measured > 0)
        before = self.curvature.get(worker, torch.zeros_like(measured)).to(measured)
        smoothed = torch.where(before > 0, SMOOTHING * before + (1 - SMOOTHING) * measured, measured)
        self.curvature[worker] = torch.where(usable, smoothed, before)


def make_step_size(config: ExtrapConfig) -> StepSize:
    """The step size that a configuration asks for."""
    if config.step_size == "auto":
        return AutoStepSize(config)
    return StepSize(config) if config.step_ratio is None else RatioStepSize(config)


def learning_rate(group: Group) -> float:
    """The learning rate of a parameter group as a number."""
    if group.get("lr") is None:
        raise ValueError(
            "the base optimizer keeps no learning rate (lr is None), which step_ratio and step_size 'auto' need; "
            "give a numeric step_size, or give the base optimizer a learning rate."
        )
    return float(group["lr"])


def length_of(moves: Mapping[int, Tensor], steps: Steps) -> Tensor:
    """The length of all moves together, each times its step."""
    return torch.linalg.vector_norm(_products(steps, norms(list(moves.values()))))


def _products(steps: Steps, factors: Tensor) -> Tensor:
    """Each step times its factor, (len(steps),); one number for all steps is not copied to the device."""
    if isinstance(steps, Tensor):
        return factors * steps
    first = steps[0]
    if not isinstance(first, Tensor) and all(step == first for step in steps):
        return factors * first
    return torch.stack([factor * step for factor, step in zip(factors.unbind(), steps, strict=True)])


def _readable(steps: Steps) -> list[float | Tensor]:
    """Python floats on the CPU, where this needs no synchronization; else 0-dim tensors."""
    if isinstance(steps, Tensor):
        return list(steps.tolist() if steps.device.type == "cpu" else steps.unbind())
    return [float(s) if isinstance(s, Tensor) and s.device.type == "cpu" else s for s in steps]
