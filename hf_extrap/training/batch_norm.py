"""BatchNorm while extrapolating: statistics gathered once a step, alike on all processes, anew before evaluations."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_extrap.optim.batch_norm import batch_norms, recalibrate, running_statistics, running_statistics_kept

from .reporting import ReportingMixin


class BatchNormMixin(ReportingMixin):
    """Running statistics, which training gathers at y and evaluation uses at x.

    As under DDP, where the first process's are broadcast, only the first worker's pass of a step counts. With
    `recalibrate_batch_norm`, so many of the last training micro-batches of each process, at x, take their place
    before evaluations and before the model is saved for good; once, as long as neither has changed.
    """

    def _start_batch_norm(self) -> None:
        self._for_batch_norm: deque[dict[str, Any]] = deque(maxlen=self.args.recalibrate_batch_norm)
        self._has_batch_norm = bool(batch_norms(self.model))
        self._recalibrated_at: list[int] | None = None

    def _keep_for_batch_norm(self, batches: Sequence[dict[str, Any]]) -> None:
        if self.args.recalibrate_batch_norm and self._has_batch_norm:
            self._for_batch_norm.extend(batches)
            self._recalibrated_at = None

    def _statistics_of_first_worker(self, model: nn.Module, micro_batch: int) -> AbstractContextManager[None]:
        """Around a worker's pass at y."""
        optimizer = self.extrapolated
        is_first = optimizer is None or optimizer.virtual_workers == 1 or micro_batch == 0
        return nullcontext() if is_first else running_statistics_kept(model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The stock evaluation, with statistics that are those of x and of all processes."""
        self._settle_batch_norm()
        return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock saving; checkpoints keep the statistics as they are, a model saved for good gets those of x."""
        if not _internal_call:
            self._settle_batch_norm()
        super().save_model(output_dir, _internal_call)

    def _settle_batch_norm(self) -> None:
        """Make the statistics those of x and of all processes; a collective call."""
        if not self._has_batch_norm:
            return
        if not self._for_batch_norm:
            if dist.is_available() and dist.is_initialized():
                # Processes gather their own between one step and the next; the first one's are saved.
                for statistic in running_statistics(self.model):
                    dist.broadcast(statistic, src=0)
        elif self._has_engine or self._recalibrated_at is None or self._recalibrated_at != self._hashes():
            recalibrate(self.model, self._for_batch_norm, self._pass_for_batch_norm)
            for statistic in running_statistics(self.model):
                statistic.copy_(self.accelerator.reduce(statistic, "mean"))
            self._recalibrated_at = None if self._has_engine else self._hashes()

    def _hashes(self) -> list[int]:
        """One number for each parameter and running statistic, the same as long as no value changes."""
        tensors = (*self.model.parameters(), *running_statistics(self.model))
        return torch.stack([torch.hash_tensor(tensor.detach()) for tensor in tensors]).tolist()

    def _pass_for_batch_norm(self, inputs: dict[str, Any]) -> None:
        with self.compute_loss_context_manager(), self._probing():
            self.compute_loss(self.model, self._prepare_inputs(dict(inputs)))
