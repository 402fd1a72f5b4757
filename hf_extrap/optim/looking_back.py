"""After the pass at y: what the step has seen, and what the next one looks along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .directions import differences, last_update
from .displacement import norms, total_norm
from .memory import Buffers
from .moving import Moving
from .statistics import clipping_factor, cosine, shrinking


class LookingBack(Moving):
    """The part of `Extrapolated` that learns from a step: statistics, curvature, past directions."""

    def _observe(self, gradients: Buffers, clipped: bool) -> None:
        """Look at the averaged gradient once a step: statistics, and the curvature of global scope."""
        if self._observed:
            return
        self._observed = True
        if self._measures and not self.config.is_local and 0 in self._probed:
            factor = self._clipping_factor(gradients) if clipped else 1.0
            self._measure(0, [g if g is None else g / factor for g in gradients])
        if not self.collect_statistics:
            return
        square = total_norm([g for g in gradients if g is not None]).square()
        if (norm := self._engine.gradient_norm()) is not None:
            square = square.new_tensor(norm**2)
        self._noted.replace("gradient_square", square)
        if passes := self._capture.pass_squares:
            # Each pass's loss was divided by their number.
            factor = (len(passes) / self._grad_scale()) ** 2
            self._noted.replace("pass_square", *(square * factor for square in passes))
            self._noted.replace("passes", torch.tensor(float(len(passes))))
        self._noted.replace("direction_cosine", *(cosine(d, gradients) for d in self._directions_at_hand() if d))

    def _clipping_factor(self, gradients: Buffers) -> float | Tensor:
        """What clipping has multiplied the averaged gradient by."""
        if not self._engine.steps_inside:
            return clipping_factor(gradients, self._memory.captured_of(0))
        norm = self._engine.gradient_norm()
        return shrinking(total_norm([g for g in gradients if g is not None]), norm) if norm else 1.0

    def _directions_at_hand(self) -> Iterator[Buffers]:
        """The directions of this step, or, from the past, the local gradients that will be the next one's."""
        if self.config.direction == "past_gradient" and self.config.is_local:
            return (self._memory.captured_of(worker) for worker in self._memory.captured_workers())
        return iter(self._memory.directions.values())

    def _measure(self, key: int, at_y: Buffers) -> None:
        """Smooth ‖g(y) − g(x)‖ / ‖y − x‖ into the curvature of a worker that has just probed."""
        at_x = self._memory.directions[key]
        pairs = enumerate(zip(at_y, at_x, strict=True))
        change = {i: a.sub(b.to(a)) for i, (a, b) in pairs if a is not None and b is not None}
        if change and key in self._lengths:
            seen = self._in_metric(change, 0.5)
            self._sizes.measure(key, total_norm(list(seen.values())), self._lengths[key])

    def _look_back(self, stepped: Sequence[bool]) -> None:
        """Turn what this step saw into what the next one looks along."""
        if self._measures and self.config.is_local:
            for worker in self._probed.intersection(self._memory.captured_workers()):
                self._measure(worker, self._memory.captured_of(worker))
        goes_on = self.config.is_past and self.config.is_active(self.step_count + 1)
        if not goes_on:
            self._memory.drop_directions()
        self._look_at_step(stepped, goes_on)
        if goes_on and self.config.is_local:
            self._memory.turn_captured_into_directions()

    def _look_at_step(self, stepped: Sequence[bool], goes_on: bool) -> None:
        """The lengths of the step from x before to x now, and the step itself where the next one looks along it."""
        before, self._before = self._before, {}
        params, change = self._params(), differences(before, self._params())
        if self._needs_step_length:
            lengths = norms(list(change.values()))
            self._noted.note("step_length", torch.linalg.vector_norm(lengths))
            if len(change) < len(params):
                each = dict(zip(change, lengths.unbind(), strict=True))
                nothing = lengths.new_zeros(())
                lengths = torch.stack([each.get(i, nothing) for i in range(len(params))])
            self._last_step = lengths
        if goes_on and self.config.direction == "past_update":
            update = last_update(self._engine.groups(), stepped, change, self._sizes.learning_rate)
            self._memory.take_over(0, update)
        else:
            for i, spent in before.items():
                self._memory.spares.give(i, spent)

    def _grad_scale(self) -> float:
        scaler = self.grad_scaler
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        return scale * self._engine.loss_scale
