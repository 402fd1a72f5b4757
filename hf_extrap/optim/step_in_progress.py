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
        worker: the current virtual worker.
        probed: workers with a fresh direction; 0 in global scope.
        is_probed: whether `probing` came last, so that `train` comes next.
        is_observed: whether the averaged gradient has been observed.
        statistics: noted during the step, if any are collected.
    """

    worker: int = 0
    probed: set[int] = field(default_factory=set)
    is_probed: bool = False
    is_observed: bool = False
    statistics: StepStatistics = field(default_factory=StepStatistics)


def observe(
    step: StepInProgress,
    number: int,
    scheme: Scheme,
    engine: Engine,
    gradients: Sequence[Tensor | None],
    clipped: bool,
    loss_scale: LossScale | None,
) -> None:
    """Observe the averaged gradient once per step: the curvature of global scope, and statistics.

    Args:
        step: the step in progress.
        number: of the step, counted from 0.
        scheme: measures the curvature.
        engine: may have clipped the gradient.
        gradients: the averaged gradient ḡ.
        clipped: whether ḡ may have been clipped since the backward pass.
        loss_scale: of the statistics; None to collect none.
    """
    if step.is_observed:
        return
    step.is_observed = True
    if scheme.measures_curvature(number) and not scheme.direction.local and 0 in step.probed:
        factor = _clipping(scheme, engine, gradients) if clipped else 1.0
        scheme.measure_curvature(0, [g if g is None else g / factor for g in gradients])
    if loss_scale is not None:
        compared = scheme.direction.compared(scheme.local_gradients)
        step.statistics.note_gradient(gradients, engine.gradient_norm(), compared)
        if squares := scheme.hooks.pass_squares:
            step.statistics.note_passes(squares, loss_scale.current())


def _clipping(scheme: Scheme, engine: Engine, gradients: Sequence[Tensor | None]) -> float | Tensor:
    """The factor by which clipping has multiplied the averaged gradient."""
    if not engine.steps_inside:
        return clipping_factor(gradients, scheme.local_gradients.of(0))
    norm = engine.gradient_norm()
    return ratio(total_norm([g for g in gradients if g is not None]), norm) if norm else 1.0
