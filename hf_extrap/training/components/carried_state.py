"""Truncated backpropagation through time: each worker's recurrent state is the initial state of its next batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hf_extrap.training.checkpoints.rank_state import RankState

from .base import Component, Inputs

State = tuple[Tensor, ...]

EVALUATION = "evaluation"
"""The slot of passes outside training."""


class CarriedState(Component):
    """The recurrent states `cache_params` of each slot, detached: (layers, batch, hidden) each.

    A slot is a virtual worker of this process, or the evaluation; `worker` is the one whose pass is next.
    """

    worker = 0
    _frozen = False

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._states: dict[str, State] = {}

    def slot(self, training: bool) -> str:
        """The slot of the next pass."""
        return f"worker {self.worker}" if training else EVALUATION

    def before_step(self, batches: Sequence[Inputs]) -> None:
        """Begin the streams of a new epoch with no state."""
        epoch = self.trainer.state.epoch
        if epoch is None or float(epoch).is_integer():
            self._states.clear()

    def before_evaluate(self) -> None:
        """Begin the evaluation with no state."""
        self.put(EVALUATION, None)

    def feed(self, slot: str, inputs: Inputs) -> Inputs:
        """The inputs with the slot's state, if it has one; a smaller batch gets the state of its first rows."""
        if slot not in self._states:
            return inputs
        rows = inputs["input_ids"].shape[0]
        state = self._states[slot]
        if rows > state[0].shape[1]:
            sizes = f"a batch has {rows} rows and the carried state of {slot!r} has {state[0].shape[1]}"
            raise ValueError(
                f"{sizes}; allowed with carry_state: batches that hold the next chunk of the same streams."
            )
        return {**inputs, "cache_params": tuple(part[:, :rows].contiguous() for part in state)}

    def keep(self, slot: str, outputs: Any) -> None:
        """Take the state that the outputs end with, except inside `starting_from`."""
        if self._frozen:
            return
        state = outputs.get("cache_params") if isinstance(outputs, dict) else None
        if state is None:
            raise ValueError("carry_state needs a model whose outputs hold `cache_params`; set carry_state to false.")
        self._states[slot] = tuple(part.detach() for part in state)

    def of(self, slot: str) -> State | None:
        """The slot's state, None before its first batch."""
        return self._states.get(slot)

    def put(self, slot: str, state: State | None) -> None:
        """Set a slot to a state that `of` gave."""
        if state is None:
            self._states.pop(slot, None)
        else:
            self._states[slot] = state

    @contextmanager
    def starting_from(self, state: State | None) -> Iterator[None]:
        """Passes inside change no state; in evaluation mode they start from the given one."""
        self.put(EVALUATION, state)
        self._frozen = True
        try:
            yield
        finally:
            self._frozen = False
            self.put(EVALUATION, None)

    def tensors(self) -> dict[str, Tensor]:
        """Every state, by slot and index."""
        return {f"{slot}.{i}": part for slot, state in self._states.items() for i, part in enumerate(state)}

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        parts: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            slot, _, index = name.rpartition(".")
            parts.setdefault(slot, {})[int(index)] = tensor.to(self.trainer.args.device)
        self._states = {slot: tuple(by_index[i] for i in sorted(by_index)) for slot, by_index in parts.items()}

    def state(self) -> RankState:
        """Every state, in the group `carried`."""
        return RankState({"carried": self.tensors()})

    def load(self, state: RankState) -> None:
        self.set_tensors(state.tensors.get("carried", {}))
