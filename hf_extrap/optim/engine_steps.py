"""The steps of an engine: callbacks around them, and the part that the engine leaves to the base optimizer."""

from __future__ import annotations

import torch

from .protocol import ExtrapolatedOptimizer


class EngineSteps:
    """Callbacks for `Engine.follow`.

    Args:
        optimizer: connected to the engine.
    """

    def __init__(self, optimizer: ExtrapolatedOptimizer) -> None:
        self._optimizer = optimizer

    def before(self, ends: bool) -> None:
        """A micro-batch has been passed; `ends` if a step of the optimizer comes with it."""
        optimizer = self._optimizer
        optimizer.restore(keep=not ends)
        if ends and optimizer.engine.steps_inside:
            optimizer.scheme.before_step(optimizer.step_count, optimizer.collect_statistics)
        elif ends and optimizer.collect_statistics:
            optimizer.observe()

    @torch.no_grad()
    def after(self, taken: bool) -> None:
        """The engine has written x of the next step, or has skipped the step."""
        optimizer = self._optimizer
        if not taken:
            optimizer.discard()
            return
        optimizer.keep_gradients(optimizer.engine.gradients())
        optimizer.end_step([p.requires_grad for p in optimizer.engine.leaves()])


def step_part(optimizer: ExtrapolatedOptimizer) -> None:
    """The base optimizer's step with the groups that the engine has put into it."""
    if optimizer.collect_statistics or optimizer.scheme.needs_averaged_gradient(optimizer.step_count):
        optimizer.engine.collect([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.train_base()
    optimizer.base.step()
