"""The sums behind the logged training loss, which a resumed run needs to log what the uninterrupted one does."""

from __future__ import annotations

from typing import Any

from hf_extrap.training.checkpoints.rank_state import RankState

from .base import Component


class RunningLoss(Component):
    """Saves and restores the stock Trainer's sums of the loss, which its checkpoints lack.

    Without them the first loss that a resumed run logs is a mean over the steps since the resume only.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._restored: dict[str, float] | None = None
        self._first_step = 0

    def state(self) -> RankState:
        """Sums of the loss since the last logged row and before it, and the steps from which and to which they run."""
        trainer = self.trainer
        losses = {
            "since_logged": float(trainer._tr_loss),
            "before": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "first_step": self._first_step,
        }
        return RankState(facts={"losses": losses})

    def load(self, state: RankState) -> None:
        """The inverse of `state`, in effect from `restore` on; a checkpoint without sums starts them anew."""
        self._restored = state.facts.get("losses")
        self._first_step = int(self._restored["first_step"]) if self._restored else self.trainer.state.global_step

    def start(self) -> None:
        """Begin a training."""
        self._restored, self._first_step = None, 0

    def restore(self) -> None:
        """Set the sums that `load` has read, after the stock loop has set them to 0."""
        if (restored := self._restored) is None:
            return
        trainer, self._restored = self.trainer, None
        trainer._tr_loss.fill_(restored["since_logged"])
        trainer._total_loss_scalar = restored["before"]
        trainer._globalstep_last_logged = int(restored["last_logged"])

    def logs(self, row: dict[str, float]) -> dict[str, float]:
        """The mean loss of all steps that the sums run over; the stock one divides by the steps since the resume."""
        trainer = self.trainer
        if "train_loss" not in row or not trainer.is_in_train:
            return {}
        steps = trainer.state.global_step - self._first_step
        return {"train_loss": trainer._total_loss_scalar / max(steps, 0.001)}
