"""The sums behind the logged training loss: what they leave out, and what a resumed run needs of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_extrap.training.checkpoints.rank_state import RankState

from .base import Component


class RunningLoss(Component):
    """Saves and restores the stock Trainer's sums of the loss, and takes their means over the finite losses.

    The stock checkpoints lack the sums: the first loss that a resumed run logs would be a mean over the steps since
    the resume only. The stock `logging_nan_inf_filter` puts a mean of the losses before it, at first 0, in the place
    of a loss that is not finite: a run of skipped steps would log 0.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._restored: dict[str, float] | None = None
        self._first_step = self._last_logged = 0
        self._left_out = self._left_out_before = 0.0

    def summand(self, loss: Tensor, micro_batches: int) -> Tensor:
        """A micro-batch's summand of the logged loss: 0 where it is not finite, which the means leave out.

        Without a direction it is the loss, as in the stock Trainer.

        Args:
            loss: the micro-batch's, divided by their number.
            micro_batches: of this step.
        """
        filters = self.trainer.extrap_config.direction != "none" and self.trainer.args.logging_nan_inf_filter
        if not filters or torch.isfinite(loss):
            return loss
        self._left_out += 1 / micro_batches
        return torch.zeros_like(loss)

    def state(self) -> RankState:
        """Sums of the loss since the last logged row and before it, and the steps from which and to which they run."""
        trainer = self.trainer
        losses = {
            "since_logged": float(trainer._tr_loss),
            "before": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "first_step": self._first_step,
            "left_out": self._left_out,
            "left_out_before": self._left_out_before,
        }
        return RankState(facts={"losses": losses})

    def load(self, state: RankState) -> None:
        """The inverse of `state`, in effect from `restore` on; a checkpoint without sums starts them anew."""
        self._restored = state.facts.get("losses")
        losses = self._restored or dict.fromkeys(("first_step", "last_logged"), self.trainer.state.global_step)
        self._first_step, self._last_logged = int(losses["first_step"]), int(losses["last_logged"])
        self._left_out, self._left_out_before = losses.get("left_out", 0.0), losses.get("left_out_before", 0.0)

    def start(self) -> None:
        """Begin a training."""
        self._restored, self._first_step, self._last_logged = None, 0, 0
        self._left_out = self._left_out_before = 0.0

    def restore(self) -> None:
        """Set the sums that `load` has read, after the stock loop has set them to 0."""
        if (restored := self._restored) is None:
            return
        trainer, self._restored = self.trainer, None
        trainer._tr_loss.fill_(restored["since_logged"])
        trainer._total_loss_scalar = restored["before"]
        trainer._globalstep_last_logged = int(restored["last_logged"])

    def logs(self, row: dict[str, float]) -> dict[str, float]:
        """The mean loss of the steps since the last row, or of all steps, without those that are not finite.

        The stock `train_loss` divides by the steps since the resume. A mean over no step is NaN.
        """
        trainer = self.trainer
        if not trainer.is_in_train or not {"loss", "train_loss"} & set(row):
            return {}
        step, left_out = trainer.state.global_step, self._left_out
        if trainer.accelerator.num_processes > 1:
            left_out = float(trainer.accelerator.reduce(torch.tensor(left_out, device=trainer.args.device), "mean"))
        self._left_out = 0.0
        self._left_out_before += left_out
        if "train_loss" in row:
            steps = step - self._first_step
            return {"train_loss": _mean(trainer._total_loss_scalar, steps, self._left_out_before)}
        steps, self._last_logged = step - self._last_logged, step
        return {"loss": _mean(row["loss"] * steps, steps, left_out)} if left_out else {}


def _mean(total: float, steps: int, left_out: float) -> float:
    """Over `steps` without those that are left out; NaN if that is all of them, and 0 for no step at all."""
    counted = steps - left_out
    return total / counted if counted > 1e-6 else 0.0 if not steps else math.nan
