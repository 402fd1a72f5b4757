"""A small problem and the loop of one process, shared by the processes of `ddp_processes` and by their test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.directions.noise import noise
from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.reference import Loss, Trajectory, extrapolate
from tests.support.plain_loop import BASES, SCHEMES, Run, values, warm_up_and_decay

LOCAL = [name for name, config in SCHEMES.items() if config.is_local and config.direction != "none"]


@dataclass(frozen=True)
class Job:
    """One run of two processes; the fields say how it differs from the simplest."""

    scheme: str
    base: str = "sgd"
    virtual_workers: int = 1
    accumulation: int = 1  # micro-batches of one worker's gradient
    branches: str = "all"  # the layers that a batch uses: "all", "not spare", or "extra on rank 0" and no spare
    rows: tuple[int, int] = (7, 7)  # of a micro-batch, by rank
    steps: tuple[int, int] = (9, 9)  # by rank; uneven ones under Join
    ddp: tuple[tuple[str, Any], ...] = field(default=())
    hook: str = ""  # the user's communication hook
    averaged: bool = False  # local probes are not told of the module, and average for nothing
    set_to_none: bool = True  # of zero_grad

    def __str__(self) -> str:
        extra = [f"{self.virtual_workers} virtual"] * (self.virtual_workers > 1)
        extra += [f"{self.accumulation} micro-batches"] * (self.accumulation > 1)
        extra += [self.branches] * (self.branches != "all") + [f"rows {self.rows}"] * (self.rows != (7, 7))
        extra += [f"steps {self.steps}"] * (self.steps != (9, 9)) + [name for name, _ in self.ddp]
        extra += [self.hook] * bool(self.hook) + ["averaged"] * self.averaged + ["zeroed"] * (not self.set_to_none)
        return ", ".join([self.scheme, self.base, *extra])

    @property
    def config(self) -> ExtrapConfig:
        return SCHEMES[self.scheme]


class Branching(nn.Module):
    """A trunk that every batch uses, and two layers that it may do without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.spare = nn.Linear(5, 8)
        self.trunk = nn.Linear(5, 8)
        self.extra = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, inputs: Tensor, spare: bool, extra: bool) -> Tensor:
        hidden = self.trunk(inputs)
        hidden = hidden + self.extra(inputs) if extra else hidden
        return self.head(torch.tanh(hidden + self.spare(inputs) if spare else hidden))


def loss_of_micro_batch(model: Callable[..., Tensor], job: Job, step: int, worker: int, index: int) -> Tensor:
    """The mean loss of a worker's micro-batch `index`; worker v · 2 + r is virtual worker v of rank r."""
    rank = worker % 2
    generator = torch.Generator().manual_seed(1000 * step + 10 * worker + index)
    inputs = torch.randn(job.rows[rank], 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (job.rows[rank],), generator=generator)
    spare, extra = job.branches == "all", job.branches != "extra on rank 0" or rank == 0
    return nn.functional.cross_entropy(model(inputs, spare, extra), labels)


def run_loop(
    model: nn.Module, optimizer: Extrapolated, job: Job, workers: Sequence[int], steps: int, probed: nn.Module | None
) -> Run:
    """Train as the documentation tells: for each of this process's workers its micro-batches, then a step."""
    params, config, A = list(model.parameters()), job.config, job.accumulation
    scheduler = warm_up_and_decay(optimizer)
    run = Run(x=[values(params)])
    last = (workers[-1], A - 1)

    def backward(step: int, k: int, index: int) -> None:
        # A static graph's first passes must be synchronized: without, torch alone fails too.
        synchronizes = (k, index) == last or (step == 0 and ("static_graph", True) in job.ddp)
        with nullcontext() if synchronizes else unsynchronized(model):
            (loss_of_micro_batch(model, job, step, k, index) / (A * len(workers))).backward()

    for step in range(steps):
        if config.scope == "global" and optimizer.wants_probe:
            with optimizer.probing(model=probed):
                for k in workers:
                    for index in range(A):
                        backward(step, k, index)
        ys = []
        for v, k in enumerate(workers):
            if config.scope == "local" and optimizer.wants_probe:
                with optimizer.probing(worker=v, model=probed):
                    for index in range(A):
                        backward(step, k, index)
            for index in range(A):
                optimizer.train(worker=v)
                ys += [values(params)] * (index == 0)
                backward(step, k, index)
        optimizer.step()
        optimizer.zero_grad(set_to_none=job.set_to_none)
        scheduler.step()
        run.x.append(values(params))
        run.y.append(ys)
    return run


def unsynchronized(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def textbook(job: Job) -> Trajectory:
    """The reference's run with all workers of both processes; one whose batches are spent has no gradient."""
    model, K = Branching(), 2 * job.virtual_workers
    names = [name for name, _ in model.named_parameters()]

    def loss_of(k: int) -> Loss:
        def loss(point: list[Tensor], step: int, probe: bool) -> Tensor:
            if step >= job.steps[k % 2]:
                return sum((p.sum() * 0 for p in point), torch.zeros((), dtype=torch.float64))

            def at(*inputs: Any) -> Tensor:
                return torch.func.functional_call(model, dict(zip(names, point, strict=True)), inputs)

            losses = [loss_of_micro_batch(at, job, step, k, index) for index in range(job.accumulation)]
            return torch.stack(losses).mean()

        return loss

    def drawn(step: int, k: int) -> list[Tensor]:
        kind, seed = job.config.direction, job.config.seed
        return [d.double() for d in noise(kind, list(model.parameters()), seed=seed, step=step, worker=k)]

    return extrapolate(
        list(model.parameters()),
        [loss_of(k) for k in range(K)],
        BASES[job.base],
        job.config,
        max(job.steps),
        schedule=warm_up_and_decay,
        noise=drawn,
    )


ACCUMULATED = [
    Job(scheme, base, virtual_workers, accumulation)
    for scheme in SCHEMES
    for base in BASES
    for virtual_workers, accumulation in ((1, 2), (2, 1), (2, 2))
]
UNUSED = [
    Job(scheme, virtual_workers=V, accumulation=A, branches=branches, ddp=(("find_unused_parameters", True),))
    for scheme in SCHEMES
    for branches in ("not spare", "extra on rank 0")
    for V, A in ((1, 1), (2, 1), (1, 2))
]
STATIC = [
    Job(scheme, virtual_workers=V, branches=branches, ddp=(("static_graph", True),), averaged=averaged)
    for scheme in SCHEMES
    for branches in ("all", "not spare")
    for V in (1, 2)
    for averaged in (False, True)
    if not averaged or (SCHEMES[scheme].is_fresh and scheme in LOCAL)
]
UNEVEN = [
    *(Job(scheme, rows=(7, 3), accumulation=A) for scheme in SCHEMES for A in (1, 2)),
    *(Job(scheme, steps=steps) for scheme in SCHEMES for steps in ((9, 6), (4, 9))),
    *(Job(scheme, accumulation=2, steps=(5, 9)) for scheme in SCHEMES),
]
VIEWS = [
    Job(scheme, virtual_workers=V, ddp=(("gradient_as_bucket_view", True),), averaged=averaged, set_to_none=set_to_none)
    for scheme in SCHEMES
    for V in (1, 2)
    for averaged in (False, True)
    for set_to_none in (True, False)
    if not averaged or (SCHEMES[scheme].is_fresh and scheme in LOCAL)
]
EXACT = ACCUMULATED + UNUSED + STATIC + UNEVEN + VIEWS
"""Jobs that the textbook does too."""
HOOKED = [
    Job(scheme, virtual_workers=V, accumulation=A, hook=hook)
    for scheme in SCHEMES
    for hook in ("bf16", "PowerSGD")
    for V, A in ((1, 1), (2, 1), (1, 2))
]
