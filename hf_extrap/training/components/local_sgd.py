"""Post-local SGD in the Trainer: after a share of the training, each worker steps its own copy of the parameters."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_extrap.optim.local_sgd import LocalSGD
from hf_extrap.training.checkpoints.rank_state import local_sgd_file

from .base import Component, Inputs

logger = logging.getLogger(__name__)


class LocalSteps(Component):
    """`local_steps` and `local_sgd_start`, with `LocalSGD` between `Extrapolated` and the base optimizer.

    It is the first component: the others must find the mean of the copies before an evaluation or a save. Each
    micro-batch's step is taken in `training_step`, on the gradient of its own mean loss, clipped by itself; the loop
    clips and logs the mean gradient of this process's workers, which no optimizer steps with.
    """

    @property
    def optimizer(self) -> LocalSGD | None:
        """The wrapper; None without local SGD."""
        optimizer = self.trainer.extrapolated
        return optimizer.base if optimizer is not None and isinstance(optimizer.base, LocalSGD) else None

    @property
    def is_local(self) -> bool:
        """Whether workers step by themselves now."""
        return (local := self.optimizer) is not None and local.is_local

    def before_step(self, batches: Sequence[Inputs]) -> None:
        """Start the local steps when their time has come."""
        if (local := self.optimizer) is None:
            return
        args, state, optimizer = self.trainer.args, self.trainer.state, self.trainer.extrapolated
        assert optimizer is not None
        start = math.ceil(args.local_sgd_start * state.max_steps)
        if optimizer.config.moves and optimizer.config.start_step >= start:
            raise ValueError(
                f"extrap_start_step is {optimizer.config.start_step} and local SGD starts at step {start}; allowed: an "
                "extrapolation that starts before and ends there, or extrap none."
            )
        if state.global_step < start:
            # An interrupted training may have left it local.
            local.stop()
        elif not local.is_local or optimizer.config.is_active(optimizer.step_count):
            if optimizer.config.is_active(optimizer.step_count):
                # Skipped steps do not count.
                end = min(start, optimizer.step_count)
                optimizer.config = dataclasses.replace(optimizer.config, end_step=end)
            optimizer.statistics = {}
            local.start()
            if self.trainer.is_world_process_zero():
                workers = args.world_size * local.virtual_workers
                message = "from step %d on each of %d workers steps by itself, and every %d steps they are averaged"
                level = logging.INFO if workers > 1 else logging.WARNING
                logger.log(level, message, state.global_step, workers, local.local_steps)

    @contextmanager
    def step(self, model: nn.Module, micro_batch: int) -> Iterator[None]:
        """The pass inside is a worker's own step at its copy of x, once local steps have started."""
        local, optimizer = self.optimizer, self.trainer.extrapolated
        if local is None or optimizer is None or not local.is_local:
            yield
            return
        unaveraged = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
        worker = micro_batch if local.virtual_workers > 1 else 0
        norm = self.trainer.args.max_grad_norm
        with local.worker(worker, loss_scale=optimizer.loss_scale, max_grad_norm=norm), unaveraged:
            yield
        # The gradient that a finished worker leaves is not that of an abandoned step.
        optimizer.reset_step()

    def before_evaluate(self) -> None:
        """Set the parameters to the mean of the copies, which stay as they are."""
        if (local := self.optimizer) is not None:
            local.settle()

    def before_save(self, is_checkpoint: bool) -> None:
        self.before_evaluate()

    def average(self) -> None:
        """Average the copies, also between averagings: a checkpoint holds one x."""
        if (local := self.optimizer) is not None:
            local.average()

    def stop(self) -> None:
        """Average the copies and step together from now on."""
        self.average()
        if (local := self.optimizer) is not None:
            local.stop()

    def save(self, checkpoint: str) -> None:
        """Write the optimizer states of this process's workers."""
        if (local := self.optimizer) is not None and local.is_local:
            torch.save(local.local_state_dict(), Path(checkpoint) / local_sgd_file(self.trainer.args.process_index))

    def restore(self, checkpoint: str) -> None:
        """Read what `save` wrote; without this process's file, the first one's says how many workers there were."""
        files = [Path(checkpoint) / local_sgd_file(rank) for rank in (self.trainer.args.process_index, 0)]
        found = next((file for file in files if file.is_file()), None)
        if (local := self.optimizer) is not None and found is not None:
            local.load_local_state_dict(torch.load(found, map_location="cpu", weights_only=True))
