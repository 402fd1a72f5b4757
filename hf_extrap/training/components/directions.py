"""The directions and curvatures of each process in a checkpoint."""

from __future__ import annotations

from hf_extrap.training.checkpoints.rank_state import RankState

from .base import Component

GROUPS = ("directions", "curvature")


class Directions(Component):
    """Saves what `Extrapolated.local_state_dict` holds beside the optimizer's own file, which the first process writes.

    A single process without an engine has it in that file already.
    """

    @property
    def _is_alone(self) -> bool:
        return self.trainer.accelerator.num_processes == 1 and not self.trainer.has_engine

    def state(self) -> RankState:
        """The tensors of this process, and whose they are."""
        if (optimizer := self.trainer.extrapolated) is None:
            return RankState()
        local = optimizer.local_state_dict()
        tensors = {} if self._is_alone else {name: local[name] for name in GROUPS}
        return RankState(tensors, {"owner": local["owner"]})

    def load(self, state: RankState) -> None:
        optimizer = self.trainer.extrapolated
        if optimizer is not None and "owner" in state.facts and not self._is_alone:
            named = {name: state.tensors.get(name, {}) for name in GROUPS}
            optimizer.load_local_state_dict({"owner": state.facts["owner"], **named})
