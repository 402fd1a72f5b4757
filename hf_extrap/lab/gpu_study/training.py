"""One run of the study: a coroutine that trains in a slot and yields after every micro-batch."""

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
"""Training images that BatchNorm's running statistics are taken over before an evaluation."""


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        workers: virtual workers of a large batch.
        worker_batch: images of a worker, over which BatchNorm takes its statistics.
        warm_up: epochs in which the learning rate rises from 0; it is divided by 10 at 1/2 and 3/4 of the epochs.
        depth: of the ResNet, 6n + 2.
        width: channels of its first stage.
        epochs: of a run of the first stage.
        long_epochs: of a run of the second stage; the first number of which enough runs fit is taken.
        local_steps: steps between two averagings of post-local SGD.
        seeds: of the second stage; the first stage has seed 0.
    """

    workers: int = 32
    worker_batch: int = 256
    warm_up: float = 5
    depth: int = 20
    width: int = 16
    epochs: int = 15
    long_epochs: tuple[int, ...] = (60, 30, 15)
    local_steps: int = 8
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        stage: `a`, tuning, or `b`, with new seeds.
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
        """The method and what differs from its usual run."""
        batch = ", batch of one worker" if self.workers == 1 else ""
        return self.method.name + batch + (", then post-local SGD" if self.post_local else "")

    def steps(self, images: int, worker_batch: int) -> int:
        """Optimizer steps of the training."""
        return max(4, round(self.epochs * images / (self.workers * worker_batch)))


def train(run: Run, slot: Slot, images: Images, setting: Setting) -> Generator[int, None, dict[str, Any]]:
    """Train, and evaluate after each quarter of the steps, with the parameters at x.

    Yields:
        Images processed since the last yield.

    Returns:
        The row of the run: accuracies in percent, and the mean training loss of each epoch, which is the loss at y.
    """
    slot.reset(run.seed)
    available, workers = len(images.train.labels), run.workers
    steps = run.steps(available, setting.worker_batch)
    warm_up = round(steps * min(setting.warm_up / run.epochs, 0.5))
    base = run.method.optimizer(slot, run.rate)
    optimizer = Extrapolated(base, run.method.config(warm_up, run.seed), virtual_workers=workers)
    local = LocalSGD(base, setting.local_steps, virtual_workers=workers)
    batches = micro_batches(images.train, setting.worker_batch, setting.workers, run.seed)
    quarters = [round(steps * quarter / 4) for quarter in (1, 2, 3, 4)]
    losses: list[float] = []
    curve: list[float] = []
    passes, tested = 0, 0.0
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
            passes += 1
            yield setting.worker_batch
        if local.is_local:
            local.step()
            local.zero_grad()
        else:
            optimizer.step()
            optimizer.zero_grad()
        if step + 1 not in quarters:
            continue
        if local.is_local:
            local.average() if step + 1 == steps else local.settle()
        slot.recalibrate(images.train.images[:RECALIBRATION])
        found = torch.stack(
            [slot.correct(images.validation).double(), slot.correct(images.test).double(), slot.loss_sum.double()]
        )
        slot.loss_sum.zero_()
        values = yield from slot.fetch(found)
        losses.append(values[2] / passes)
        curve.append(100 * values[0] / len(images.validation.labels))
        tested, passes = 100 * values[1] / len(images.test.labels), 0
        if not losses[-1] < 20:
            break
    described = asdict(run)
    method = described.pop("method")
    return {
        **{"name": run.name, "family": method["family"], "base": method["base"], "scheme": method["scheme"]},
        **described,
        **{"steps": steps, "batch": workers * setting.worker_batch, "diverged": len(curve) < 4},
        **{"validation": curve[-1], "test": tested, "validation_curve": curve, "loss_at_y": losses},
    }
