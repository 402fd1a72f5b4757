"""Truncated backpropagation through time: each worker's recurrent state goes on in its next batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class CarriedState:
    """The recurrent states `cache_params` of each slot, detached: (layers, batch, hidden) each.

    A slot is a virtual worker of this process, or the evaluation.
    """

    def __init__(self) -> None:
        self._states: dict[str, State] = {}

    def feed(self, slot: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with the slot's state, if it has one; a smaller batch gets the state of its first rows."""
        if slot not in self._states:
            return inputs
        rows = inputs["input_ids"].shape[0]
        state = self._states[slot]
        if rows > state[0].shape[1]:
            raise ValueError(
                f"a batch has {rows} rows and the carried state of {slot!r} has {state[0].shape[1]}: with carry_state "
                "every batch holds the next chunk of the same streams."
            )
        return {**inputs, "cache_params": tuple(part[:, :rows].contiguous() for part in state)}

    def keep(self, slot: str, outputs: Any) -> None:
        """Take the state that the outputs end with."""
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

    def reset(self) -> None:
        """Start all streams anew."""
        self._states.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Every state, for a checkpoint."""
        return {f"{slot}.{i}": part for slot, state in self._states.items() for i, part in enumerate(state)}

    def load(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """The inverse of `tensors`."""
        parts: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            slot, _, index = name.rpartition(".")
            parts.setdefault(slot, {})[int(index)] = tensor.to(device)
        self._states = {slot: tuple(by_index[i] for i in sorted(by_index)) for slot, by_index in parts.items()}
