"""The passes at x that give a fresh direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.training.checkpoints.rank_state import RankState

from .base import Component, Inputs


class FreshDirection(Component):
    """Takes a worker's gradient at x over the samples of its pass at y, a fraction of them, or `independent` ones.

    Attributes:
        batches: the micro-batches of this step.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.batches: list[Inputs] = []
        self._states: dict[str, Tensor] = {}
        self._earlier: tuple[list[Inputs], dict[str, Tensor]] = ([], {})

    def before_step(self, batches: Sequence[Inputs]) -> None:
        """Take the step's micro-batches and the recurrent states that they begin with."""
        self._earlier = self.batches, self._states
        self.batches, self._states = list(batches), self.trainer.carried.tensors()

    def samples(self) -> tuple[list[Inputs], dict[str, Tensor] | None]:
        """The micro-batches that the direction is taken on, and their recurrent states if not the current ones."""
        if self._is_independent and len(self._earlier[0]) >= len(self.batches):
            return self._earlier
        return self.batches, None

    def probe(self, model: nn.Module, optimizer: Extrapolated, worker: int) -> None:
        """Take the gradient at x of the worker whose pass at y is next, or of all workers for a global direction."""
        carried, config = self.trainer.carried, self.trainer.extrap_config
        current, first = carried.tensors(), carried.worker
        micro_batches = range(len(self.batches))
        if optimizer.virtual_workers > 1 and config.scope == "local":
            micro_batches = range(first, first + 1)
        batches, states = self.samples()
        model.train()
        if states is not None:
            carried.set_tensors(states)
        with optimizer.probing(worker=worker, model=model) as backward:
            for carried.worker in micro_batches:
                is_last = carried.worker == micro_batches[-1]
                with self._averaging(model, is_last, first == len(self.batches) - 1):
                    inputs = first_rows(batches[carried.worker], config.batch_fraction)
                    loss = self.trainer.loss_of(inputs, model=model)
                    self.trainer.pass_back(loss / self.trainer.current_gradient_accumulation_steps, backward)
        carried.worker = first
        carried.set_tensors(current)

    @contextmanager
    def _averaging(self, model: nn.Module, last: bool, step_averages: bool) -> Iterator[None]:
        """Average a global direction over processes in the last of its passes only."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            yield
            model.set_requires_gradient_sync(step_averages)
            return
        if self.trainer.extrap_config.scope == "local" or not isinstance(model, DistributedDataParallel):
            yield
            return
        before = model.require_backward_grad_sync
        model.require_backward_grad_sync = last
        try:
            yield
        finally:
            model.require_backward_grad_sync = before

    @property
    def _is_independent(self) -> bool:
        return self.trainer.extrap_config.batch == "independent"

    def state(self) -> RankState:
        """The micro-batches of the last step and their recurrent states: the next step's `independent` samples."""
        if not self._is_independent:
            return RankState()
        batches = {
            # Labels may be the inputs themselves, and safetensors refuses tensors that share memory.
            f"{index}.{name}": value.clone()
            for index, batch in enumerate(self.batches)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        return RankState({"step_batches": batches, "step_states": self._states})

    def load(self, state: RankState) -> None:
        device = self.trainer.args.device
        batches: dict[int, Inputs] = {}
        for key, value in state.tensors.get("step_batches", {}).items():
            index, _, name = key.partition(".")
            batches.setdefault(int(index), {})[name] = value.to(device)
        self.batches = [batches[index] for index in sorted(batches)]
        self._states = {name: value.to(device) for name, value in state.tensors.get("step_states", {}).items()}


def first_rows(inputs: Inputs, share: float) -> Inputs:
    """The first rows of every tensor of a batch, at least one."""
    if share == 1:
        return dict(inputs)
    rows = max(t.shape[0] for t in inputs.values() if isinstance(t, Tensor) and t.dim())
    kept = max(1, math.ceil(share * rows))
    return {
        name: t[:kept] if isinstance(t, Tensor) and t.dim() and t.shape[0] == rows else t for name, t in inputs.items()
    }
