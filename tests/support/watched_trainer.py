"""A Trainer whose every pass is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_extrap import ExtrapTrainer
from tests.support.measuring import Step, Watch
from tests.support.plain_loop import values


class WatchedTrainer(ExtrapTrainer):
    """Keeps the steps of its training, each with its inputs.

    Attributes:
        steps: in order, skipped ones included.
        inputs: the micro-batch of each.
        half: whether passes compute in float16 with a scaled loss, which accelerate refuses on a CPU.
        overflow_at: the step whose loss scale is far too large.
    """

    half = False
    overflow_at: int | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.half and self.accelerator.scaler is None:
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, backoff_factor=2.0**-50)
        optimizer = super().create_optimizer(model)
        self.watch = Watch([p for group in optimizer.param_groups for p in group["params"]])
        self.steps: list[Step] = []
        self.inputs: list[dict[str, Tensor]] = []
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        (inputs,) = batches
        groups, wrapper = self.optimizer.param_groups, self.extrapolated
        rates = [group["lr"] for group in groups for _ in group["params"]]
        peaks = [group["initial_lr"] for group in groups for _ in group["params"]]
        step = Step(values(self.watch.params), rates, peaks, [], number=wrapper.step_count)
        if self.half:
            if len(self.steps) == self.overflow_at:
                self.accelerator.scaler.update(2.0**60)
            step.scale = self.accelerator.scaler.get_scale()
        if self.steps and self.steps[-1].number < step.number:
            step.before = self.steps[-1]
        self.watch.passes = step.passes
        self.steps.append(step)
        self.inputs.append({name: inputs[name] for name in ("input_ids", "labels")})
        return batches, count

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self.watch.forward() as tell, torch.autocast("cpu", torch.float16, enabled=self.half):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            tell(loss)
        return loss
