"""What lives within one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .engines.base import Engine
from .foreach import total_norm
from .loss_scale import LossScale
from .scheme import Scheme
from .step_statistics import StepStatistics, clipping_factor, ratio


@dataclass
class StepInProgress:
    """The state of a step, which is never saved.

    Attributes:
        scheme: of the optimizer.
        engine: holds the parameters.
        scale: of the loss.
        worker: the current virtual worker.
        probed: workers with a fresh direction; 0 in global scope.
        is_probed: whether `probing` came last, so that `train` comes next.
        is_observed: whether the averaged gradient has been observed.
        keeps_directions: whether the directions are used again.
        statistics: noted during the step, if any are collected.
    """

    scheme: Scheme
    engine: Engine
    scale: LossScale
    worker: int = 0
    probed: set[int] = field(default_factory=set)
    is_probed: bool = False
    is_observed: bool = False
    keeps_directions: bool = False
    statistics: StepStatistics = field(default_factory=StepStatistics)

    def select(self, worker: int | None, virtual_workers: int) -> int:
        """Make a virtual worker the current one; returns the number under which its direction is kept."""
        if worker is not None:
            if not 0 <= worker < virtual_workers:
                raise ValueError(f"worker is {worker}; allowed: 0 to {virtual_workers - 1} (virtual_workers).")
            self.worker = worker
        return self.worker if self.scheme.direction.local else 0

    def mark_probed(self, worker: int) -> None:
        """Note that a fresh direction has been stored for a worker (0 in global scope)."""
        self.probed.add(worker)
        self.is_probed = True

    def was_abandoned(self) -> bool:
        """Whether the step's gradients are gone, or its loss scale has dropped since it began."""
        if not self.scheme.hooks.seen:
            return False
        # DeepSpeed keeps gradients elsewhere, and reports a step that it skips.
        are_gone = not self.engine.steps_inside and all(p.grad is None for p in self.engine.params())
        return are_gone or self.scale.has_dropped()

    def observe(self, number: int, gradients: Sequence[Tensor | None], clipped: bool, collects: bool) -> None:
        """Observe the averaged gradient once: the curvature of global scope, and statistics.

        Args:
            number: of the step, counted from 0.
            gradients: the averaged gradient ḡ.
            clipped: whether ḡ may have been clipped since the backward pass.
            collects: whether to note statistics.
        """
        if self.is_observed:
            return
        self.is_observed, scheme = True, self.scheme
        # A step may come without a backward pass at y.
        has_pass = not clipped or self.engine.steps_inside or 0 in scheme.local_gradients.workers()
        if scheme.measures_curvature(number) and not scheme.direction.local and 0 in self.probed and has_pass:
            factor = self._clipping(gradients) if clipped else 1.0
            scheme.measure_curvature(0, [g if g is None else g / factor for g in gradients])
        if collects:
            compared = scheme.direction.compared(scheme.local_gradients)
            self.statistics.note_gradient(gradients, self.engine.gradient_norm(), compared)
            if squares := scheme.hooks.pass_squares:
                self.statistics.note_passes(squares, self.scale.current())

    def _clipping(self, gradients: Sequence[Tensor | None]) -> float | Tensor:
        """The factor by which clipping has multiplied the averaged gradient."""
        if not self.engine.steps_inside:
            return clipping_factor(gradients, self.scheme.local_gradients.of(0))
        norm = self.engine.gradient_norm()
        return ratio(total_norm([g for g in gradients if g is not None]), norm) if norm else 1.0
