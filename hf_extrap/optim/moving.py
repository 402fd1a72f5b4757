"""The move from x to y: along which direction, and how far."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .base_iterate import BaseIterate
from .capture import GradientCapture
from .config import ExtrapConfig
from .directions import noise
from .displacement import displace_, scale_direction, total_norm
from .engines import Engine
from .memory import Buffers, DirectionMemory
from .preconditioner import adam_preconditioner
from .statistics import StepStatistics
from .step_size import StepSize
from .wrapper import OptimizerWrapper

logger = logging.getLogger(__name__)


class Moving(OptimizerWrapper):
    """The part of `Extrapolated` that moves parameters; what it reads and keeps is made there."""

    config: ExtrapConfig
    step_count: int
    collect_statistics: bool
    grad_scaler: torch.amp.GradScaler | None
    _engine: Engine
    _sizes: StepSize
    _memory: DirectionMemory
    _last_step: Tensor | None
    _cold_after_load: bool
    _x: BaseIterate
    _capture: GradientCapture
    _noted: StepStatistics
    _probed: set[int]
    _observed: bool
    _lengths: dict[int, Tensor]
    _preconditioner: Buffers | None

    def _params(self) -> list[Tensor]:
        return self._engine.params()

    def _move(self, key: int) -> None:
        params = self._params()
        self._x.restore(params)
        direction = self._preconditioned(self._direction(key)) if self.config.precondition else self._direction(key)
        indices = [i for i, d in enumerate(direction) if d is not None]
        if not indices:
            return
        x = [params[i] for i in indices]
        last_step = self._last_step
        if self.config.scales_by_step:
            if last_step is None:
                return
            # A parameter that has joined since has not been stepped.
            last_step = torch.nn.functional.pad(last_step, (0, len(params) - len(last_step)))
            if self.config.scaling == "layer_step":
                last_step = last_step[indices]
        moves = scale_direction(self.config.scaling, [d for d in direction if d is not None], x, last_step)
        scaled = dict(zip(indices, moves, strict=True))
        self._x.leave(params, indices, key)
        steps = self._steps(key, scaled)
        for start, stop, step in steps:
            group = [i for i in range(start, stop) if i in scaled]
            seeds = [("rounding", self.config.seed, self.step_count, self._worker_number(key), i) for i in group]
            displace_([params[i] for i in group], [scaled[i] for i in group], step, seeds)
        self._engine.moved()
        if self.collect_statistics:
            self._noted.note("displacement_norm", total_norm([self._x.kept[i].sub(params[i]) for i in indices]))
            self._noted.note("step_size", torch.as_tensor(steps[0][2]).abs())

    def _steps(self, key: int, scaled: dict[int, Tensor]) -> list[tuple[int, int, float | Tensor]]:
        """(first parameter, one past the last, η) of each group, after the cap; keeps ‖x − y‖ where it is measured."""
        steps: list[tuple[int, int, float | Tensor]] = []
        start = 0
        for index, (options, params) in enumerate(self._engine.groups()):
            stop = start + len(params)
            steps.append((start, stop, self._sizes.of_group(index, options, key)))
            start = stop
        cap = self.config.max_displacement
        if cap is not None and self._last_step is not None:
            length = _length(scaled, steps)
            tiny = torch.finfo(length.dtype).tiny
            last_length = torch.linalg.vector_norm(self._last_step).to(length)
            factor = (cap * last_length / length.clamp_min(tiny)).clamp_max(1)
            steps = [(a, b, step * factor) for a, b, step in steps]
        if self._measures:
            self._lengths[key] = _length(self._in_metric(scaled, -0.5), steps)
        return steps

    def _preconditioned(self, direction: Buffers) -> Buffers:
        """P d; nothing for a parameter that the base optimizer has not stepped yet."""
        params = self._params()
        if self._preconditioner is None:
            self._preconditioner = adam_preconditioner(self.base, params)
        moved: Buffers = []
        for p, d, scale in zip(params, direction or [None] * len(params), self._preconditioner, strict=True):
            if d is not None and scale is None and self.state.get(p):
                raise ValueError(
                    f"precondition is true, but the base optimizer {type(self.base).__name__} keeps no exp_avg_sq and "
                    "step for each element; allowed: Adam and its kin, or precondition false."
                )
            moved.append(None if d is None or scale is None else scale * d)
        return moved

    def _in_metric(self, tensors: dict[int, Tensor], power: float) -> dict[int, Tensor]:
        """Each tensor times its Pᵖᵒʷᵉʳ; without a preconditioner the tensors themselves."""
        if (scales := self._preconditioner) is None:
            return tensors
        return {i: t if (scale := scales[i]) is None else t * scale.pow(power).to(t) for i, t in tensors.items()}

    def _direction(self, key: int) -> Buffers:
        params = self._params()
        if self.config.is_noise:
            moves = [p.requires_grad for p in self._engine.leaves()]
            drawn = iter(
                noise(
                    self.config.direction,
                    [p for p, moved in zip(params, moves, strict=True) if moved],
                    seed=self.config.seed,
                    step=self.step_count,
                    worker=self._worker_number(key),
                )
            )
            return [next(drawn) if moved else None for moved in moves]
        if key not in self._memory.directions and self._cold_after_load and self.step_count > 0:
            logger.warning("this worker's direction was not in the checkpoint: its first step does not extrapolate")
        self._cold_after_load = False
        return self._memory.directions.get(key, [])

    # What the configuration asks of this step

    @property
    def _needs_step_length(self) -> bool:
        return self.config.max_displacement is not None or self.config.scales_by_step or self.collect_statistics

    @property
    def _keeps_averaged_gradient(self) -> bool:
        config = self.config
        return config.direction == "past_gradient" and not config.is_local and config.is_active(self.step_count + 1)

    @property
    def _measures(self) -> bool:
        return self.config.measures(self.step_count)

    def _key(self, worker: int) -> int:
        """Whose direction a worker uses: its own, or the one of all."""
        return worker if self.config.is_local else 0

    def _worker_number(self, key: int) -> int:
        """The number of this process's worker among those of all processes; 0 for all in global scope."""
        rank, world_size = self._engine.worker()
        return key * world_size + rank if self.config.is_local else 0


def _length(moves: dict[int, Tensor], steps: Sequence[tuple[int, int, float | Tensor]]) -> Tensor:
    """The length of moves by parameter, each times the η of its group."""
    parts = [total_norm([moves[i] for i in range(a, b) if i in moves]) for a, b, _ in steps]
    return total_norm([(part * step).to(parts[0]) for part, (_, _, step) in zip(parts, steps, strict=True)])
