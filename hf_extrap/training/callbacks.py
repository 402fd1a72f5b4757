"""Callbacks of the Trainer: stopping a run that diverges, or that does nothing but skip steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

if TYPE_CHECKING:
    from .trainer import ExtrapTrainerMixin


class DivergenceStopper(TrainerCallback):
    """Ends training when the logged loss is not finite, or far above the first one once the warm-up is over.

    The reference is the first logged loss: one after the warm-up may be that of a run that diverged during it. All
    processes log the same mean, so that all stop. Without `factor`, the multiple of the first loss that ends training,
    only losses that are not finite do; `step` is the step at which training was ended, or None. A row whose loss is
    not finite because its steps were skipped is no divergence, since x is as it was; `max_skipped_steps` in a row are.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.first_loss: float | None = None
        self.step: int | None = None
        self._skipped = 0

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None or self.step is not None:
            return
        before, self._skipped = self._skipped, logs.get("extrap/skipped_steps", 0)
        if not math.isfinite(loss) and self._skipped > before:
            return
        if self.first_loss is None:
            # A resumed run finds its first loss in the history.
            earlier = (row["loss"] for row in state.log_history if math.isfinite(row.get("loss", math.nan)))
            self.first_loss = next(earlier, loss)
        limit = math.inf if self.factor is None else self.factor * self.first_loss
        if not math.isfinite(loss) or (loss > limit and state.global_step > args.get_warmup_steps(state.max_steps)):
            self.stop(args, state, control)

    def stop(self, args: Any, state: TrainerState, control: TrainerControl) -> None:
        """End training here."""
        self.step = state.global_step
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.step is not None:
            control.should_training_stop = True
            # Diverged weights are neither evaluated nor saved.
            control.should_evaluate = control.should_save = False


class SkippedStepsLimit(TrainerCallback):
    """Ends training after `max_skipped_steps` skipped steps in a row: by a `DivergenceStopper`, or with an error.

    All processes skip the same steps, so that all stop.

    Raises:
        ValueError: that says how many, at which step, and what to decrease.
    """

    def __init__(self, trainer: ExtrapTrainerMixin) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer, limit = self._trainer.extrapolated, args.max_skipped_steps
        if optimizer is None or limit is None or optimizer.config.direction == "none":
            return
        optimizer.notice_skip()
        if optimizer.skipped_in_a_row < limit:
            return
        callbacks = self._trainer.callback_handler.callbacks
        stoppers = [callback for callback in callbacks if isinstance(callback, DivergenceStopper)]
        for stopper in stoppers:
            stopper.stop(args, state, control)
        if not stoppers:
            scale = ", or the loss scale of fp16" if args.fp16 else ""
            raise ValueError(
                f"{optimizer.skipped_in_a_row} steps in a row were skipped up to step {state.global_step}, each for a "
                f"gradient that is not finite; allowed: fewer than {limit} (max_skipped_steps), by a smaller "
                f"learning_rate ({args.learning_rate:g}) or extrapolation step size{scale}, or by data without NaN."
            )
