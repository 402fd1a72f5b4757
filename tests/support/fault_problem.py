"""Two processes of which one sees bad numbers, in a plain loop and in the Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_extrap import ExtrapConfig, Extrapolated, ExtrapTrainer
from tests.support.faults import Fault
from tests.support.plain_loop import BASES, make_batch, make_model, take_passes, values
from tests.support.tiny_trainer import make

PRESETS = ("extrap", "extrap-past", "extragradient", "optimistic", "past-update", "gaussian", "sam")
NAN, INF = math.nan, math.inf
FAULTS = {
    2: Fault(1, 0, NAN, in_loss=False, at_x=False, parameter=2),
    3: Fault(0, 0, INF, in_loss=True, at_x=False),
    5: Fault(1, 0, -INF, in_loss=False, at_x=True),
    6: Fault(0, 0, NAN, in_loss=True, at_x=True),
}
"""By the attempt."""


def plain_loop(preset: str) -> dict[str, Any]:
    """x after each of 8 attempts, and how many were skipped."""
    rank = dist.get_rank()
    model = DistributedDataParallel(make_model())
    params = list(model.parameters())
    optimizer = Extrapolated(BASES["sgd"](params), ExtrapConfig.preset(preset))
    xs = []
    for attempt in range(8):
        fault, number = FAULTS.get(attempt), optimizer.step_count

        def backward(worker: int, index: int, probe: Any) -> None:
            inputs, labels = make_batch(number, rank)  # noqa: B023
            loss = nn.functional.cross_entropy(model(inputs), labels)
            if fault is not None and (fault.replica, fault.at_x) == (rank, probe is not None):  # noqa: B023
                loss = fault.spoil(loss, model)  # noqa: B023
            loss.backward()

        take_passes(optimizer, backward, model=model)
        optimizer.step()
        optimizer.zero_grad()
        xs.append(values(params))
    return {"x": xs, "skipped": optimizer.skipped_steps, "taken": optimizer.step_count}


class SpoiledTrainer(ExtrapTrainer):
    """Finds a NaN in the loss of the second process from step 5 on."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.nan if self.state.global_step >= 5 and self.args.process_index == 1 else loss


def trainer(folder: Path) -> dict[str, Any]:
    trainer = make(folder, SpoiledTrainer, extrap="extrap-past", max_steps=50, max_skipped_steps=4, logging_steps=3)
    error = ""
    try:
        trainer.train()
    except ValueError as raised:
        error = str(raised)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"error": error, "x": values(list(trainer.model.parameters())), "losses": losses}


def in_processes(folder: Path, *words: str) -> dict[str, Any]:
    dist.init_process_group("gloo")
    seen = {preset: plain_loop(preset) for preset in PRESETS}
    return {**seen, "trainer": trainer(folder / f"run_{dist.get_rank()}")}


def expected(preset: str) -> list[list[Tensor]]:
    """x after each step of one process with two virtual workers, without the faults; directions are dropped alike."""
    model = make_model()
    optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), ExtrapConfig.preset(preset), virtual_workers=2)
    xs = []
    for attempt in range(8):
        fault, number = FAULTS.get(attempt), optimizer.step_count
        if fault is not None and (not fault.at_x or optimizer.wants_probe):
            optimizer.discard()
        else:

            def backward(worker: int, index: int, probe: Any) -> None:
                inputs, labels = make_batch(number, worker)  # noqa: B023
                (nn.functional.cross_entropy(model(inputs), labels) / 2).backward()

            take_passes(optimizer, backward)
            optimizer.step()
            optimizer.zero_grad()
        xs.append(values(list(model.parameters())))
    return xs
