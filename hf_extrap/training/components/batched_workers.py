"""All virtual workers of a step in one pass: the first micro-batch runs them, the others look up their loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from hf_extrap.optim.batched_workers import BatchedWorkers
from hf_extrap.optim.extrapolated import Extrapolated

from .fresh_direction import FreshDirection, first_rows


class WorkersInOnePass:
    """`batch_workers`: the training loop is unchanged and gets its losses from one pass a step."""

    def __init__(self, trainer: Any, fresh: FreshDirection) -> None:
        self.trainer = trainer
        self._fresh = fresh
        self._workers: BatchedWorkers | None = None
        self._num_items: Any = None
        self._losses: Sequence[Tensor] = []

    def training_step(self, model: nn.Module, optimizer: Extrapolated, index: int, num_items: Any) -> Tensor:
        """The loss of micro-batch `index` as the stock step returns it; index 0 runs all workers."""
        if index == 0:
            model.train()
            self._num_items = num_items
            if self._workers is None or self._workers.optimizer is not optimizer:
                self._workers = BatchedWorkers(optimizer, model, self._loss_of_worker)
            batches = [self.trainer.prepare(batch) for batch in self._fresh.batches]
            if optimizer.wants_probe:
                share = self.trainer.extrap_config.batch_fraction
                samples = self._fresh.samples()[0][: len(batches)]
                self._workers.probe([self.trainer.prepare(first_rows(batch, share)) for batch in samples])
            self._losses = (self._workers.backward(batches) * optimizer.loss_scale).unbind()
        return self._losses[index]

    def _loss_of_worker(self, model: nn.Module, inputs: Any) -> Tensor:
        trainer = self.trainer
        with trainer.compute_loss_context_manager():
            if self._num_items is None or not trainer.model_accepts_loss_kwargs:
                return cast(Tensor, trainer.compute_loss(model, dict(inputs)))
            loss = cast(Tensor, trainer.compute_loss(model, dict(inputs), num_items_in_batch=self._num_items))
            # This loss is already the worker's share of the step's, and the pass multiplies it by loss_scale.
            return loss / cast(BatchedWorkers, self._workers).optimizer.loss_scale
