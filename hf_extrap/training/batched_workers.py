"""The Trainer with all virtual workers in one pass: the first micro-batch of a step runs them, the others look up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from hf_extrap.optim.batched_workers import BatchedWorkers, check_batchable
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated

from .base import refuse
from .reporting import ReportingMixin

Inputs = dict[str, Any]


class BatchedWorkersMixin(ReportingMixin):
    """`batch_workers`: the loop of the Trainer stays as it is, and gets its losses from one pass a step."""

    _step_batches: list[Inputs]
    _extrap_config: ExtrapConfig

    def _start_batched_workers(self) -> None:
        self._workers: BatchedWorkers | None = None
        self._num_items: Any = None
        self._losses_of_workers: Sequence[Tensor] = []
        if not self.args.batch_workers:
            return
        args = self.args
        obstacles = {
            "extrap_virtual_workers is 1": args.extrap_virtual_workers == 1,
            "carry_state is true": args.carry_state,
            "there are several processes": args.world_size > 1,
            "there are several devices": args.n_gpu > 1,
            "the engine is DeepSpeed": self.is_deepspeed_enabled,
            "the engine is FSDP": self.is_fsdp_enabled,
            "fp16 is true": args.fp16,
            "torch_compile is true": args.torch_compile,
            "gradient_checkpointing is true": args.gradient_checkpointing,
            "compute_loss_func is given": self.compute_loss_func is not None,
        }
        refuse(
            "batch_workers is true",
            obstacles,
            "several virtual workers in one process on one device, in float32 or bf16, without state carried on, "
            "compilation, checkpointing of activations or a loss function of your own; or batch_workers false",
        )
        check_batchable(self.model)

    def _probed(self) -> tuple[list[Inputs], dict[str, Tensor] | None]:
        raise NotImplementedError

    def _batched_training_step(self, model: nn.Module, optimizer: Extrapolated, index: int, num_items: Any) -> Tensor:
        """The loss of the step's micro-batch `index` as the stock step returns it; the first call runs all workers."""
        if index == 0:
            model.train()
            self._num_items = num_items
            if self._workers is None or self._workers.optimizer is not optimizer:
                self._workers = BatchedWorkers(optimizer, model, self._loss_of_worker)
            batches = [self._prepare_inputs(batch) for batch in self._step_batches]
            if optimizer.wants_probe:
                share = self._extrap_config.batch_fraction
                probed = [self._prepare_inputs(first_rows(batch, share)) for batch in self._probed()[0]]
                self._workers.probe(probed[: len(batches)])
            self._losses_of_workers = (self._workers.backward(batches) * optimizer.loss_scale).unbind()
            self._last_pass = (batches[-1], None)
        return self._losses_of_workers[index]

    def _loss_of_worker(self, model: nn.Module, inputs: Any) -> Tensor:
        with self.compute_loss_context_manager():
            if self._num_items is None or not self.model_accepts_loss_kwargs:
                return cast(Tensor, self.compute_loss(model, dict(inputs)))
            loss = cast(Tensor, self.compute_loss(model, dict(inputs), num_items_in_batch=self._num_items))
            # This loss is a worker's share of the step's already, and the pass takes a share of it.
            return loss / cast(BatchedWorkers, self._workers).optimizer.loss_scale


def first_rows(inputs: Inputs, share: float) -> Inputs:
    """The first rows of every tensor of a batch, at least one."""
    if share == 1:
        return dict(inputs)
    rows = max(t.shape[0] for t in inputs.values() if isinstance(t, Tensor) and t.dim())
    kept = max(1, math.ceil(share * rows))
    return {
        name: t[:kept] if isinstance(t, Tensor) and t.dim() and t.shape[0] == rows else t for name, t in inputs.items()
    }
