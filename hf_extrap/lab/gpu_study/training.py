"""One run of the study: a generator that trains in a slot and yields after every micro-batch."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.local_sgd import LocalSGD

from .data import Images, micro_batches
from .methods import Method
from .slot import Slot

RECALIBRATION = 5000
"""Training images from which BatchNorm's running statistics are taken before an evaluation."""
Training = Generator[int, None, dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        workers: virtual workers of a large batch.
        worker_batch: images of a worker, over which BatchNorm takes its statistics.
        rates: peak learning rates of SGD in the first stage, in the order in which they are tried.
        warm_up: epochs in which the learning rate increases from 0, at most a quarter of a run; it is divided by 10 at
            1/2 and 3/4 of a run.
        depth: of the ResNet, 6n + 2.
        epochs: of a run of the first stage.
        long_epochs: of a run of the second stage; the first of these for which enough runs fit is taken.
        local_steps: steps between two averagings of post-local SGD.
        seeds: of the second stage; the first stage has seed 0.
    """

    workers: int = 32
    worker_batch: int = 256
    rates: tuple[float, ...] = (1.6, 0.8, 3.2, 0.4)
    warm_up: float = 5
    depth: int = 20
    epochs: int = 30
    long_epochs: tuple[int, ...] = (60, 30, 15)
    local_steps: int = 8
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        stage: `a`, tuning, or `b`, other seeds.
        rate: peak learning rate.
        post_local: whether the second half is post-local SGD.
    """

    stage: str
    method: Method
    rate: float
    seed: int
    epochs: int
    workers: int
    post_local: bool = False

    @property
    def name(self) -> str:
        """The method and its variant."""
        batch = ", batch of one worker" if self.workers == 1 else ""
        return self.method.name + batch + (", then post-local SGD" if self.post_local else "")


def train(run: Run, slot: Slot, images: Images, setting: Setting) -> Training:
    """Train, and evaluate at x after each quarter of the steps.

    Yields:
        Images processed since the last yield.

    Returns:
        The row of the run: accuracies in percent, and the mean training loss of each quarter, which is the loss at y.
    """
    slot.reset(run.seed)
    workers, batch = run.workers, run.workers * setting.worker_batch
    steps = max(4, round(run.epochs * len(images.train.labels) / batch))
    warm_up = round(steps * min(setting.warm_up / run.epochs, 0.25))
    base = run.method.optimizer(slot, run.rate)
    optimizer = Extrapolated(base, run.method.config(warm_up, run.seed), virtual_workers=workers)
    local = LocalSGD(base, setting.local_steps, virtual_workers=workers)
    batches = micro_batches(images.train, setting.worker_batch, setting.workers, run.seed)
    quarters = [round(steps * quarter / 4) for quarter in (1, 2, 3, 4)]
    losses: list[float] = []
    curve: list[float] = []
    since, tested = 0, 0.0
    for step in range(steps):
        decay = 1.0 if step < steps / 2 else 0.1 if step < 3 * steps / 4 else 0.01
        base.param_groups[0]["lr"] = run.rate * decay * min(1.0, (step + 1) / max(warm_up, 1))
        if run.post_local and 2 * step >= steps and not local.is_local:
            local.start()
        for worker in range(workers):
            if local.is_local:
                with local.worker(worker):
                    slot.backward(next(batches), 1.0)
            else:
                optimizer.train(worker=worker)
                slot.backward(next(batches), 1 / workers)
            yield setting.worker_batch
        stepping = local if local.is_local else optimizer
        stepping.step()
        stepping.zero_grad()
        if step + 1 not in quarters:
            continue
        if local.is_local:
            local.average() if step + 1 == steps else local.settle()
        slot.recalibrate(images.train.images[:RECALIBRATION])
        counts = torch.stack([slot.correct(images.validation), slot.correct(images.test)])
        right, right_in_test, loss = torch.cat([counts.double(), slot.loss_sum.double()[None]]).tolist()
        slot.loss_sum.zero_()
        losses.append(loss / (workers * (step + 1 - since)))
        curve.append(100 * right / len(images.validation.labels))
        since, tested = step + 1, 100 * right_in_test / len(images.test.labels)
        if not losses[-1] < 20:
            break
    described = {name: value for name, value in asdict(run).items() if name != "method"}
    method = {"name": run.name, "family": run.method.family, "base": run.method.base, "scheme": run.method.scheme}
    accuracies = {"validation": curve[-1], "test": tested, "validation_curve": curve, "loss_at_y": losses}
    return {**method, **described, "steps": steps, "batch": batch, "diverged": len(curve) < 4, **accuracies}
