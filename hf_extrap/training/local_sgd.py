"""Post-local SGD in the Trainer: from a point of the training on, workers step by themselves."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.local_sgd import LocalSGD

from .base import refuse
from .reporting import ReportingMixin

logger = logging.getLogger(__name__)


class LocalSGDMixin(ReportingMixin):
    """`local_steps` and `local_sgd_start`, with `LocalSGD` between `Extrapolated` and the base optimizer.

    It stands first among the bases: what others do at an evaluation or a save must find the mean of the copies. Each
    micro-batch's step is taken in `training_step`, on the gradient of its own mean loss and clipped by itself; the
    loop's clipping and the logged grad_norm see the mean gradient of this process's workers, which nothing steps with.
    """

    _extrap_config: ExtrapConfig
    _micro_batch: int

    def _start_local_sgd(self) -> None:
        args = self.args
        if args.local_steps == 1:
            return
        if args.local_sgd_start == 0 and self._extrap_config.moves:
            raise ValueError(
                f"local_sgd_start is 0 and extrap is {args.extrap!r}, which has to end where local SGD starts; "
                "allowed: a share > 0, or extrap none."
            )
        workers = args.extrap_virtual_workers
        obstacles = {
            "batch_workers is true": args.batch_workers,
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps} and extrap_virtual_workers {workers}": (
                args.gradient_accumulation_steps != workers
            ),
            "the engine is DeepSpeed": self.is_deepspeed_enabled,
            "the engine is FSDP": self.is_fsdp_enabled,
            "fp16 is true": args.fp16,
            "compute_loss_func is given": self.compute_loss_func is not None,
        }
        refuse(
            f"local_steps is {args.local_steps}",
            obstacles,
            "workers that are each a process of DDP or a virtual worker of one micro-batch, one after another, in "
            "float32 or bf16 and with the model's own loss; or local_steps 1",
        )

    @property
    def _local_sgd(self) -> LocalSGD | None:
        """The wrapper; None where all workers step together to the end."""
        optimizer = self.extrapolated
        return optimizer.base if optimizer is not None and isinstance(optimizer.base, LocalSGD) else None

    @property
    def _is_local(self) -> bool:
        return (local := self._local_sgd) is not None and local.is_local

    # The loop

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The stock samples; the first local step is prepared here, and each worker's loss is a mean by itself."""
        if (local := self._local_sgd) is not None:
            start = math.ceil(self.args.local_sgd_start * self.state.max_steps)
            self._begin_or_wait(local, start)
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, None if self._is_local else num_items

    def _begin_or_wait(self, local: LocalSGD, start: int) -> None:
        optimizer = self.extrapolated
        assert optimizer is not None
        if optimizer.config.moves and optimizer.config.start_step >= start:
            raise ValueError(
                f"extrap_start_step is {optimizer.config.start_step} and local SGD starts at step {start}; allowed: an "
                "extrapolation that starts before and ends there, or extrap none."
            )
        if self.state.global_step < start:
            # What an interrupted training has left.
            local.stop()
        elif not local.is_local or optimizer.config.is_active(optimizer.step_count):
            _end_extrapolation(optimizer, start)
            local.start()
            if self.is_world_process_zero():
                log = logger.info if self.args.world_size * local.virtual_workers > 1 else logger.warning
                log(
                    "from step %d on each of %d workers steps by itself, and every %d steps they are averaged",
                    self.state.global_step,
                    self.args.world_size * local.virtual_workers,
                    local.local_steps,
                )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The stock step, which after the start is one worker's own, at its copy of x."""
        local, optimizer = self._local_sgd, self.extrapolated
        if local is None or optimizer is None or not local.is_local:
            return super().training_step(model, inputs, num_items_in_batch)
        unaveraged = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
        worker = self._micro_batch if local.virtual_workers > 1 else 0
        scale, norm = optimizer.loss_scale, self.args.max_grad_norm
        with local.worker(worker, loss_scale=scale, max_grad_norm=norm), unaveraged:
            loss = super().training_step(model, inputs, num_items_in_batch)
        # The gradient of a worker that is done is not that of a step given up.
        optimizer.reset_step()
        return loss

    def _logs_after_this_step(self) -> bool:
        # Statistics of gradients taken at one point.
        return not self._is_local and super()._logs_after_this_step()

    # Where x must be the mean

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The stock evaluation, of the mean of all copies."""
        self._settle()
        return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock saving, of the mean of all copies."""
        self._settle()
        super().save_model(output_dir, _internal_call)

    def _settle(self) -> None:
        if (local := self._local_sgd) is not None:
            local.settle()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint holds one x: the copies are averaged before it, also between averagings.
        if (local := self._local_sgd) is not None:
            local.average()
        super()._save_checkpoint(model, trial)

    def _finalize_training(self, *args: Any) -> Any:
        if (local := self._local_sgd) is not None:
            local.average()
            local.stop()
        return super()._finalize_training(*args)

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if (local := self._local_sgd) is not None and local.is_local:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(local.local_state_dict(), local_states_file(output_dir, self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if (local := self._local_sgd) is None or checkpoint is None:
            return
        # Where this process has no file, the first one's says how many workers there were.
        files = [local_states_file(checkpoint, rank) for rank in (self.args.process_index, 0)]
        if (path := next((file for file in files if file.is_file()), None)) is not None:
            local.load_local_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def local_states_file(checkpoint: str | Path, rank: int) -> Path:
    """The file of the optimizer states of one process's workers in a checkpoint folder."""
    return Path(checkpoint) / f"local_sgd_rank_{rank}.pt"


def _end_extrapolation(optimizer: Extrapolated, start: int) -> None:
    """Let no step from this one on extrapolate."""
    config = optimizer.config
    if config.is_active(optimizer.step_count):
        # Skipped steps do not count.
        optimizer.config = dataclasses.replace(config, end_step=min(start, optimizer.step_count))
    optimizer.statistics = {}
