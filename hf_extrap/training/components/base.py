"""The interface between the Trainer and its components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_extrap.training.checkpoints.rank_state import RankState

if TYPE_CHECKING:
    from hf_extrap.training.trainer import ExtrapTrainerMixin

Inputs = dict[str, Any]


class Component:
    """One concern of the Trainer. `ExtrapTrainerMixin` calls each method at the point of the loop that its name says.

    A `TrainerCallback` cannot do the same: transformers calls none before an evaluation or a save, and `on_log` comes
    after the row has been added to the history. A component uses the Trainer's public attributes and methods alone.
    """

    def __init__(self, trainer: ExtrapTrainerMixin) -> None:
        self.trainer = trainer

    def before_step(self, batches: Sequence[Inputs]) -> None:
        """Prepare the next step, given its micro-batches."""

    def before_evaluate(self) -> None:
        """Prepare an evaluation; a collective call."""

    def before_save(self, is_checkpoint: bool) -> None:
        """Prepare saving the model, in a checkpoint or for good; a collective call."""

    def logs(self, row: dict[str, float]) -> dict[str, float]:
        """What to add to a row that is about to be logged; a collective call."""
        return {}

    def state(self) -> RankState:
        """What a checkpoint must hold."""
        return RankState()

    def load(self, state: RankState) -> None:
        """Take back the state that a checkpoint holds; groups and facts of other components are ignored."""
