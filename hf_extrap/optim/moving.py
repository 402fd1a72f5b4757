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
from .displacement import displace, norms, scale_direction, total_norm
from .engines import Engine
from .memory import Buffers, DirectionMemory
from .preconditioner import adam_preconditioner
from .spares import Owners, fits
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
    _before: dict[int, Tensor]
    _cold_after_load: bool
    _x: BaseIterate
    _owners: Owners
    _capture: GradientCapture
    _noted: StepStatistics
    _probed: set[int]
    _only_looks: bool
    _observed: bool
    _lengths: dict[int, Tensor]
    _preconditioner: Buffers | None

    def _params(self) -> list[Tensor]:
        return self._engine.params()

    def _move(self, key: int) -> None:
        params = self._params()
        if self._x.come_back(params, key):
            self._engine.moved()
            return
        self._x.restore(params)
        self._x.forget()
        if key in self._memory.spent:
            raise RuntimeError(
                f"worker {key} has left its y, and its direction is spent; allowed: all micro-batches of one virtual "
                "worker before those of the next."
            )
        direction = self._direction(key)
        spends, stored = self._spends(key), direction
        if self.config.precondition:
            direction = self._preconditioned(direction)
        indices = [i for i, d in enumerate(direction) if d is not None]
        if not indices or (self.config.scales_by_step and self._last_step is None):
            if spends:
                self._memory.drop(key)
            return
        moves, factors = scale_direction(
            self.config.scaling,
            [d for d in direction if d is not None],
            [params[i] for i in indices],
            self._last_steps(indices),
        )
        scaled = dict(zip(indices, moves, strict=True))
        steps = self._steps(key, scaled, factors)
        swapped = self._points(indices, stored, spends)
        self._x.keep(params, (i for i in indices if i not in swapped))
        displace(
            [params[i] for i in indices],
            moves,
            steps,
            [swapped.get(i, params[i]) for i in indices],
            lambda place: ("rounding", self.config.seed, self.step_count, self._worker_number(key), indices[place]),
        )
        if spends:
            for i, d in enumerate(stored):
                if d is not None and swapped.get(i) is not d:
                    self._memory.spares.give(i, d)
            self._memory.spend(key)
        self._x.leave(params, indices, key, swapped)
        self._engine.moved()
        if self.collect_statistics:
            self._noted.note("displacement_norm", total_norm([self._x.kept[i].sub(params[i]) for i in indices]))

    def _last_steps(self, indices: list[int]) -> Tensor | None:
        """The length of the last step of these parameters, or for `step` of all."""
        if self._last_step is None or self.config.scaling != "layer_step":
            return self._last_step
        # A parameter that has joined since has not been stepped.
        size = len(self._params())
        lengths = torch.nn.functional.pad(self._last_step, (0, size - len(self._last_step)))
        if len(indices) == size:
            return lengths
        each = lengths.unbind()
        return torch.stack([each[i] for i in indices])

    def _spends(self, key: int) -> bool:
        """Whether a stored direction is of no more use once y is known."""
        if key not in self._memory.directions or self._measures or self._only_looks:
            return False
        # Statistics compare it with the gradient, but where that is the next direction.
        return not self.collect_statistics or (self.config.direction == "past_gradient" and self.config.is_local)

    def _points(self, indices: Sequence[int], stored: Buffers, spends: bool) -> dict[int, Tensor]:
        """Memory for y of the parameters that point to it, instead of being moved in place: where it can be, their
        direction's own."""
        points: dict[int, Tensor] = {}
        params, swap = self._params(), self.config.swap
        if not self._engine.may_swap or swap is False:
            return points
        can_swap = self._owners.among(params)
        for i in indices:
            p = params[i]
            if not can_swap[i] or (swap is None and p.device.type != "cpu"):
                continue
            d = stored[i] if spends else None
            fitting = d is not None and d.dtype == p.dtype and fits(d, p)
            points[i] = d if d is not None and fitting else self._memory.spares.take(i, p)
        return points

    def _steps(self, key: int, moves: dict[int, Tensor], factors: Tensor | None) -> list[float | Tensor]:
        """η of each move, times its factor, after the cap; keeps ‖x − y‖ where it is measured."""
        sizes: list[float | Tensor] = []
        start = 0
        for index, (options, params) in enumerate(self._engine.groups()):
            size = self._sizes.of_group(index, options, key)
            sizes += [size for i in range(start, start + len(params)) if i in moves]
            start += len(params)
        steps: list[float | Tensor] | Tensor = sizes if factors is None else _products(sizes, factors)
        cap = self.config.max_displacement
        first = sizes[0]
        if cap is not None and self._last_step is not None:
            length = _length(moves, steps)
            tiny = torch.finfo(length.dtype).tiny
            last_length = torch.linalg.vector_norm(self._last_step).to(length)
            factor = (cap * last_length / length.clamp_min(tiny)).clamp_max(1)
            steps, first = _products(steps, factor.expand(len(steps))), first * factor
        if self.collect_statistics:
            self._noted.note("step_size", torch.as_tensor(first).abs())
        if self._measures:
            self._lengths[key] = _length(self._in_metric(moves, -0.5), steps)
        return _readable(steps)

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


def _length(moves: dict[int, Tensor], steps: Sequence[float | Tensor] | Tensor) -> Tensor:
    """The length of all moves, each times its step."""
    return torch.linalg.vector_norm(_products(steps, norms(list(moves.values()))))


def _products(steps: Sequence[float | Tensor] | Tensor, factors: Tensor) -> Tensor:
    """Each step times its factor, without a number that the host must send to the device where one will do for all."""
    if isinstance(steps, Tensor):
        return factors * steps
    first = steps[0]
    if not isinstance(first, Tensor) and all(step == first for step in steps):
        return factors * first
    return torch.stack([factor * step for factor, step in zip(factors.unbind(), steps, strict=True)])


def _readable(steps: Sequence[float | Tensor] | Tensor) -> list[float | Tensor]:
    """Numbers where reading them makes nobody wait."""
    if isinstance(steps, Tensor):
        return list(steps.tolist() if steps.device.type == "cpu" else steps.unbind())
    return [float(s) if isinstance(s, Tensor) and s.device.type == "cpu" else s for s in steps]
