"""Callbacks of the Trainer: stopping a run that diverges."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class DivergenceStopper(TrainerCallback):
    """Ends training when the logged loss is not finite, or far above the first one once the warm-up is over.

    The reference is the first logged loss: one after the warm-up may be that of a run that diverged during it. All
    processes log the same mean, so that all stop. Without `factor`, the multiple of the first loss that ends training,
    only losses that are not finite do; `step` is the step at which training was ended, or None.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.first_loss: float | None = None
        self.step: int | None = None

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None or self.step is not None:
            return
        if self.first_loss is None:
            # A resumed run finds its first loss in the history.
            self.first_loss = next((row["loss"] for row in state.log_history if "loss" in row), loss)
        limit = math.inf if self.factor is None else self.factor * self.first_loss
        if not math.isfinite(loss) or (loss > limit and state.global_step > args.get_warmup_steps(state.max_steps)):
            self.step = state.global_step
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.step is not None:
            control.should_training_stop = True
            # Diverged weights are neither evaluated nor saved.
            control.should_evaluate = control.should_save = False
