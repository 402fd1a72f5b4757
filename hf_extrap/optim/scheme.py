"""One extrapolation scheme: the move to y = x − η · S(d, x), and what it remembers of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .buffers import Buffers, make_stores
from .config import ExtrapConfig
from .directions import make_direction
from .displacement import Displacement
from .engines import Engine
from .foreach import total_norm
from .last_step import LastStep
from .local_gradients import LocalGradients
from .preconditioner import Preconditioner
from .scaling import SCALINGS
from .step_size import AutoStepSize, length_of, make_step_size
from .step_statistics import StepStatistics


class Scheme:
    """The parts of a scheme for one engine. Steps are counted from 0.

    Args:
        config: names the direction, the scaling and the step size.
        engine: holds the parameters.
        base: the base optimizer, whose state gives the preconditioner.

    Attributes:
        direction, scaling, step_size, preconditioner, displacement, last_step: the parts, each in a file of its own.
        hooks: see the gradients of this process's workers.
        local_gradients: what the hooks keep of them.
    """

    def __init__(self, config: ExtrapConfig, engine: Engine, base: Optimizer) -> None:
        self._pool, directions, gradients = make_stores(offload=config.direction_device == "cpu")
        self.direction = make_direction(config, engine, directions)
        self.scaling = SCALINGS[config.scaling]
        self.step_size = make_step_size(config)
        self.preconditioner = Preconditioner(engine, base, config.precondition)
        self.displacement = Displacement(engine, self._pool, config.swap, config.seed)
        self.last_step = LastStep(engine, self._pool)
        self.hooks = engine.hooks(self._pool)
        self.hooks.takes_sparse = not config.moves
        self.local_gradients = LocalGradients(self.hooks, gradients, self.direction.dtype)
        self._config = config
        self._engine = engine
        self._distances: dict[int, Tensor] = {}

    def needs_probe(self, step: int) -> bool:
        """Whether a step needs a gradient at x first."""
        return self._config.is_active(step) and (self.direction.is_fresh or self.step_size.needs_probe(step))

    def measures_curvature(self, step: int) -> bool:
        """Whether a step compares its gradients at x and at y."""
        return self._config.is_active(step) and self.step_size.needs_probe(step)

    def needs_local_gradients(self, step: int) -> bool:
        """Whether each worker's own gradient of a step is kept: as its next direction, or to compare."""
        return self.direction.keeps_local_gradient(step) or (self.direction.local and self.measures_curvature(step))

    def needs_averaged_gradient(self, step: int) -> bool:
        """Whether the averaged gradient of a step is kept: as the next direction, or to compare."""
        compares = self.measures_curvature(step) and not self.direction.local
        return compares or self.direction.keeps_averaged_gradient(step)

    def extrapolate(self, worker: int, step: int, noted: StepStatistics | None, keep_direction: bool = False) -> None:
        """Move the parameters from x to the worker's y = x − η · S(d, x), or to x while d is cold.

        Within a step, a worker's y that has been restored from is entered again.

        Args:
            worker: of this process.
            step: the current one.
            noted: takes statistics, if any are collected.
            keep_direction: keep d for another call.
        """
        if self.displacement.reenter(worker):
            return
        self.displacement.restore()
        self.displacement.forget()
        self.direction.check_unspent(worker)
        stored = self.direction.of(worker, step)
        is_last_use = not (keep_direction or self.measures_curvature(step)) and self.direction.is_last_use(
            worker, compared=noted is not None
        )
        d = {i: v for i, v in enumerate(self.preconditioner.apply(stored)) if v is not None}
        if not d or (self._config.scales_by_step and self.last_step.lengths is None):
            if is_last_use:
                self.direction.store.drop(worker)
            return
        x, indices = self._engine.params(), list(d)
        lengths = self.last_step.lengths_of(indices if self._config.scaling == "layer_step" else None)
        moves, factors = self.scaling(list(d.values()), [x[i] for i in indices], lengths)
        d = dict(zip(indices, moves, strict=True))
        steps, first = self.step_size.steps(worker, self._engine.groups(), d, factors, self.last_step.lengths)
        if self._config.check_finite and self.needs_probe(step):
            # An infinite y may saturate into a finite gradient: a direction that is not finite makes all of y NaN.
            nothing = total_norm([v for v in stored if v is not None]).mul(0)
            added: Any = nothing.tolist() if nothing.device.type == "cpu" else nothing
            steps = [s + added for s in steps]
        if self.measures_curvature(step):
            self._distances[worker] = length_of(self.preconditioner.in_metric(d, -0.5), steps)
        number = self._engine.number_of(worker) if self.direction.local else 0
        try:
            self.displacement.move(worker, d, steps, stored if is_last_use else None, (step, number))
        except BaseException:
            self.displacement.restore()
            self.direction.store.drop(worker)
            raise
        if is_last_use:
            self.direction.spend(worker, self.local_gradients)
        if noted is not None:
            noted.note("step_size", torch.as_tensor(first).abs())
            noted.note("displacement_norm", self.displacement.length())

    def before_step(self, step: int, needs_length: bool) -> None:
        """Keep x where the difference of x over the step is needed.

        Args:
            step: the current one.
            needs_length: whether its length is noted.
        """
        if self._needs_length(needs_length) or self.direction.keeps_update(step):
            self.last_step.keep_x()

    def after_step(self, step: int, stepped: Sequence[bool], probed: set[int], noted: StepStatistics | None) -> None:
        """Remember what the next step needs.

        Args:
            step: the current one.
            stepped: whether the base optimizer has stepped each parameter.
            probed: workers with a fresh direction in this step.
            noted: takes statistics, if any are collected.
        """
        if self.direction.local and self.measures_curvature(step):
            for worker in probed.intersection(self.local_gradients.workers()):
                self.measure_curvature(worker, self.local_gradients.of(worker))
        self.direction.end_step(step)
        difference = self.last_step.difference()
        if self._needs_length(noted is not None):
            length = self.last_step.measure(difference)
            if noted is not None:
                noted.note("step_length", length)
        if self.direction.keeps_update(step):
            self.direction.keep_update(difference, stepped)
            self.last_step.hand_over()
        self.last_step.release()
        self.direction.keep_local_gradients(step, self.local_gradients)

    def measure_curvature(self, worker: int, at_y: Buffers) -> None:
        """Compare a worker's gradient at y with the one at x, its direction."""
        at_x = self.direction.store[worker]
        pairs = enumerate(zip(at_y, at_x, strict=False))
        change = {i: a.sub(b.to(a)) for i, (a, b) in pairs if a is not None and b is not None}
        if change and worker in self._distances and isinstance(self.step_size, AutoStepSize):
            seen = self.preconditioner.in_metric(change, 0.5)
            self.step_size.measure(worker, total_norm(list(seen.values())), self._distances[worker])

    def take_over(self, other: Scheme) -> None:
        """Take what a scheme of the same configuration keeps between steps."""
        self.direction.store.update(other.direction.store)
        self.step_size.peak_lr, self.step_size.curvature = other.step_size.peak_lr, other.step_size.curvature
        self.last_step.lengths = other.last_step.lengths

    def held(self) -> dict[str, list[Tensor]]:
        """The memory of this process: `x` of displaced parameters, `directions` with local gradients and free buffers,
        and what is kept on the `host`."""
        store, (device, host) = self.direction.store, self.local_gradients.held()
        return {
            "x": self.displacement.held(),
            "directions": [*self._pool.tensors(), *store.on_device(), *device],
            "host": [*store.on_host(), *host],
        }

    def release_buffers(self) -> None:
        """Release the memory of free buffers and of this step's local gradients."""
        self.local_gradients.forget()
        self._pool.clear()

    def forget_step(self) -> None:
        """Start a step."""
        self.hooks.forget()
        self.direction.forget_step()
        self.local_gradients.forget()
        self.preconditioner.forget()
        self.displacement.forget()
        self._distances = {}

    def _needs_length(self, collects: bool) -> bool:
        return collects or self._config.max_displacement is not None or self._config.scales_by_step
