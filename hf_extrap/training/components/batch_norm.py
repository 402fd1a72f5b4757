"""BatchNorm while extrapolating: statistics counted once a step, equal on all processes, recalibrated at x."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_extrap.optim.batch_norm import batch_norms, recalibrate, running_statistics, running_statistics_kept

from .base import Component, Inputs


class BatchNormStatistics(Component):
    """Running statistics, which training gathers at y and evaluation uses at x.

    As under DDP, where the first process's statistics are broadcast, only the first worker's pass of a step counts.
    With `recalibrate_batch_norm`, that many of the last training micro-batches of each process give new statistics at
    x before an evaluation and before the model is saved for good, unless neither has changed since the last time.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._recent: deque[Inputs] = deque(maxlen=trainer.args.recalibrate_batch_norm)
        self._has_batch_norm = bool(batch_norms(trainer.model))
        self._recalibrated_at: list[int] | None = None
        self._before: list[torch.Tensor] = []

    def before_step(self, batches: Sequence[Inputs]) -> None:
        self._take_back_skipped()
        if self._has_batch_norm and self.trainer.extrap_config.moves:
            self._before = [statistic.clone() for statistic in running_statistics(self.trainer.model)]
        if self._recent.maxlen and self._has_batch_norm:
            self._recent.extend(batches)
            self._recalibrated_at = None

    def of_first_worker(self, model: nn.Module, worker: int) -> AbstractContextManager[None]:
        """A worker's pass at y inside counts if it is the first worker's."""
        return running_statistics_kept(model) if worker else nullcontext()

    def before_evaluate(self) -> None:
        """Make the statistics those of x and equal on all processes."""
        if not self._has_batch_norm:
            return
        trainer = self.trainer
        self._take_back_skipped()
        if not self._recent:
            if dist.is_available() and dist.is_initialized():
                # Processes gather their own from one step to the next; those of the first are saved.
                for statistic in running_statistics(trainer.model):
                    dist.broadcast(statistic, src=0)
        elif trainer.has_engine or self._recalibrated_at is None or self._recalibrated_at != self._hashes():
            recalibrate(trainer.model, self._recent, trainer.loss_of)
            for statistic in running_statistics(trainer.model):
                statistic.copy_(trainer.accelerator.reduce(statistic, "mean"))
            self._recalibrated_at = None if trainer.has_engine else self._hashes()

    def _take_back_skipped(self) -> None:
        """Take back what a skipped step has counted: its y, or its batch, may have made the statistics NaN for good."""
        if not self._before or (optimizer := self.trainer.extrapolated) is None:
            return
        optimizer.notice_skip()
        if optimizer.skipped_in_a_row:
            for statistic, before in zip(running_statistics(self.trainer.model), self._before, strict=True):
                statistic.copy_(before)
            self._before = []

    def before_save(self, is_checkpoint: bool) -> None:
        """As before an evaluation; a checkpoint keeps the statistics as they are, so that training can resume."""
        if is_checkpoint:
            self._take_back_skipped()
        else:
            self.before_evaluate()

    def _hashes(self) -> list[int]:
        """One number for each parameter and running statistic, which changes with any of its values."""
        tensors = (*self.trainer.model.parameters(), *running_statistics(self.trainer.model))
        return torch.stack([torch.hash_tensor(tensor.detach()) for tensor in tensors]).tolist()
