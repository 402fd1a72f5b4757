"""Accelerate's `save_state` and `load_state` with the directions of every process."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import Optimizer

from hf_extrap.optim.extrapolated import Extrapolated

from .checkpoints.rank_state import RankState, load_rank_state, save_rank_state

_GROUPS = ("directions", "curvature", "last_step")


def register_directions(accelerator: Accelerator, optimizer: Optimizer) -> None:
    """Make `accelerator.save_state` and `load_state` keep what each process has of its own; call it once, after both.

    Accelerate writes the optimizer's state in the first process alone. Directions of local scope differ between
    processes: each writes its own to `extrap_rank_R.safetensors` in the same folder, and reads them again. With another
    number of processes they start cold, with a warning.

    Args:
        accelerator: of the training loop.
        optimizer: an `Extrapolated`, or what `accelerator.prepare` has returned for it.

    Raises:
        TypeError: for another optimizer.
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Extrapolated):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; allowed: Extrapolated, prepared or not.")
    state = _OwnState(accelerator, optimizer)
    accelerator.register_save_state_pre_hook(state.save)
    accelerator.register_load_state_pre_hook(state.find)
    # Loaded after the optimizer's shared state, which makes directions start cold.
    accelerator.register_for_checkpointing(state)


class _OwnState:
    def __init__(self, accelerator: Accelerator, optimizer: Extrapolated) -> None:
        self._accelerator, self._optimizer = accelerator, optimizer
        self._folder = ""

    @property
    def _rank(self) -> tuple[int, int]:
        return self._accelerator.process_index, self._accelerator.num_processes

    def save(self, models: Any, weights: Any, output_dir: str) -> None:
        local = self._optimizer.local_state_dict()
        facts = {name: local[name] for name in ("owner", "progress")}
        save_rank_state(output_dir, *self._rank, [RankState({name: local[name] for name in _GROUPS}, facts)])

    def find(self, models: Any, input_dir: str) -> None:
        self._folder = input_dir

    def state_dict(self) -> dict[str, Any]:
        """Accelerate's file of the first process; the state is in the files of all."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = load_rank_state(self._folder, *self._rank)
        if "owner" in state.facts:
            tensors = {name: state.tensors.get(name, {}) for name in _GROUPS}
            self._optimizer.load_local_state_dict({**state.facts, **tensors})
