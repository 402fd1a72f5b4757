"""Jobs of DDP: a small problem, trained by processes that each have their own workers, and by the textbook."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.directions.noise import noise
from hf_extrap.optim.reference import Loss, Trajectory, extrapolate
from tests.support.plain_loop import BASES, NOISE, SCHEMES, Cell, Run, finishing, run_steps, values, warm_up_and_decay
from tests.support.plain_loop import CELLS as PLAIN

CELLS = {**{name: Cell(config) for name, config in SCHEMES.items()}, **PLAIN, **NOISE}


@dataclass(frozen=True)
class Job:
    """One run; the fields say how it differs from the simplest."""

    cell: str
    base: str = "sgd"
    virtual_workers: int = 1  # of each process
    accumulation: int = 1  # micro-batches of one worker's gradient
    branches: str = "all"  # the layers that a batch uses: "all", "not spare", or "extra on rank 0" and no spare
    rows: tuple[int, int] = (7, 7)  # of a micro-batch, by rank
    steps: tuple[int, int] = (9, 9)  # by rank; uneven ones under Join
    ddp: str = ""  # an option of DistributedDataParallel that is set
    hook: str = ""  # the user's communication hook
    averaged: bool = False  # probes are not told of the module, so that DDP averages their gradients
    set_to_none: bool = True  # of zero_grad
    poisoned: bool = False  # worker 1 finds a NaN in its batch of step 3
    stop_at: int | None = None  # save here, and resume with new objects
    world_size: int = 2

    def __str__(self) -> str:
        changed = [f for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return ", ".join([self.cell, *(f"{f.name}={getattr(self, f.name)}" for f in changed)])

    @property
    def config(self) -> ExtrapConfig:
        return CELLS[self.cell].config


class Branching(nn.Module):
    """A trunk that every batch uses, and two layers that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.spare, self.trunk, self.extra = (nn.Linear(5, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, inputs: Tensor, spare: bool, extra: bool) -> Tensor:
        hidden = self.trunk(inputs)
        hidden = hidden + self.extra(inputs) if extra else hidden
        return self.head(torch.tanh(hidden + self.spare(inputs) if spare else hidden))


def loss_of(model: Callable[..., Tensor], job: Job, step: int, worker: int, index: int, probe: bool = False) -> Tensor:
    """The mean loss of a worker's micro-batch `index`; worker v · W + r is virtual worker v of rank r."""
    rank = worker % 2
    independent = probe and job.config.batch == "independent"
    generator = torch.Generator().manual_seed(1000 * step + 10 * worker + index + 5 * independent)
    inputs = torch.randn(job.rows[rank], 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (job.rows[rank],), generator=generator)
    if job.poisoned and (step, worker) == (3, 1):
        inputs.fill_(torch.nan)
    spare, extra = job.branches == "all", job.branches != "extra on rank 0" or rank == 0
    return nn.functional.cross_entropy(model(inputs, spare, extra), labels)


def losses_of(model: nn.Module, job: Job) -> list[Loss]:
    """Of every worker, as functions of the parameters; without batches its loss is a constant."""
    names = [name for name, _ in model.named_parameters()]

    def of_worker(k: int) -> Loss:
        def loss(point: list[Tensor], step: int, probe: bool) -> Tensor:
            if step >= job.steps[k % 2]:
                return sum((p.sum() * 0 for p in point), torch.zeros((), dtype=torch.float64))

            def at(*inputs: Any) -> Tensor:
                return torch.func.functional_call(model, dict(zip(names, point, strict=True)), inputs)

            return torch.stack([loss_of(at, job, step, k, index, probe) for index in range(job.accumulation)]).mean()

        return loss

    return [of_worker(k) for k in range(job.world_size * job.virtual_workers)]


def textbook(job: Job) -> Trajectory:
    """The reference's run with all workers of all processes."""
    model, config = Branching(), job.config
    params = list(model.parameters())

    def drawn(step: int, k: int) -> list[Tensor]:
        return [d.double() for d in noise(config.direction, params, seed=config.seed, step=step, worker=k)]

    return extrapolate(
        params,
        losses_of(model, job),
        BASES[job.base],
        config,
        max(job.steps),
        schedule=schedule(job),
        max_grad_norm=CELLS[job.cell].max_grad_norm,
        noise=drawn,
    )


def schedule(job: Job) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """The loop's scheduler steps after a skipped step too, the reference's does not: then the rate is constant."""
    return (lambda optimizer: LambdaLR(optimizer, lambda t: 1.0)) if job.poisoned else warm_up_and_decay


def communication_hook(name: str) -> tuple[Any, Callable[..., Any]]:
    """The state and the function of a user's hook."""
    if name == "bf16":
        return None, default_hooks.bf16_compress_hook
    options = {"matrix_approximation_rank": 1, "start_powerSGD_iter": 2, "min_compression_rate": 1}
    return powerSGD_hook.PowerSGDState(None, **options), powerSGD_hook.powerSGD_hook


class Training:
    """This process's model, optimizer and schedule, under DDP."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = DistributedDataParallel(Branching(), **({job.ddp: True} if job.ddp else {}))
        base = BASES[job.base](list(self.model.parameters()))
        self.optimizer = Extrapolated(base, job.config, virtual_workers=job.virtual_workers)
        self.scheduler = schedule(job)(self.optimizer)
        self.calls: list[int] = []
        if job.hook:
            state, hook = communication_hook(job.hook)

            def counted(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
                self.calls.append(bucket.buffer().numel())
                return hook(state, bucket)

            self.model.register_comm_hook(state, counted)

    def run(self, first: int, steps: int) -> Run:
        job, params, V = self.job, list(self.model.parameters()), self.job.virtual_workers

        def backward(step: int, v: int, index: int, probe: object) -> None:
            # A static graph's first passes must be synchronized: without, torch alone fails too.
            is_last = (v, index) == (V - 1, job.accumulation - 1)
            synchronizes = is_last or (step == 0 and job.ddp == "static_graph")
            worker = v * job.world_size + dist.get_rank()
            with nullcontext() if synchronizes else self.model.no_sync():
                (loss_of(self.model, job, step, worker, index, probe is not None) / (job.accumulation * V)).backward()

        finish = finishing(self.optimizer, params, self.scheduler, CELLS[job.cell].max_grad_norm, job.set_to_none)
        options: Any = {"accumulation": job.accumulation, "probed": None if job.averaged else self.model}
        with Join([self.model]) if job.steps[0] != job.steps[1] else nullcontext():
            return run_steps(params, self.optimizer, backward, finish, first=first, steps=steps, **options)

    def save(self, folder: Path) -> None:
        """As a checkpoint does: rank 0 writes what all share, each rank its own part."""
        own = copy.deepcopy(self.optimizer.local_state_dict())
        torch.save(own, folder / f"{self.job}.{dist.get_rank()}.pt")
        if dist.get_rank() == 0:
            shared = [self.model.module.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()]
            torch.save(shared, folder / f"{self.job}.pt")
        dist.barrier()

    def load(self, folder: Path) -> Training:
        weights, shared, schedule = torch.load(folder / f"{self.job}.pt", weights_only=True)
        self.model.module.load_state_dict(weights)
        self.optimizer.load_state_dict(shared)
        own = torch.load(folder / f"{self.job}.{dist.get_rank()}.pt", weights_only=True)
        self.optimizer.load_local_state_dict(own)
        self.scheduler.load_state_dict(schedule)
        return self


def train(job: Job, folder: Path) -> dict[str, Any]:
    """What this rank saw: x, every worker's y, x at the end, the calls of the user's hook."""
    training, steps = Training(job), job.steps[dist.get_rank() % 2]
    run = training.run(0, job.stop_at or steps)
    if job.stop_at is not None:
        training.save(folder)
        training = Training(job).load(folder)
        rest = training.run(job.stop_at, steps - job.stop_at)
        run = Run(x=run.x + rest.x[1:], y=run.y + rest.y)
    return {
        "x": run.x,
        "y": run.y,
        "end": values(list(training.model.parameters())),
        "calls": training.calls,
        "skipped": training.optimizer.skipped_steps,
        "wrapped": type(training.model).__name__,
        "world_size": dist.get_world_size(training.model.process_group),
    }


def in_processes(folder: Path, *which: str) -> dict[str, dict[str, Any]]:
    dist.init_process_group("gloo")
    seen = {}
    for job in (job for name in which for job in JOBS[name]):
        try:
            seen[str(job)] = train(job, folder)
        except RuntimeError as error:
            seen[str(job)] = {"error": str(error)}
    return seen


def variants(cell: str) -> Iterator[Job]:
    """A scheme with accumulation, unused parameters, static graphs, bucket views, uneven batches and steps."""
    yield from (Job(cell, base, V, A) for base in BASES for V, A in ((1, 2), (2, 1), (2, 2)))
    for branches in ("not spare", "extra on rank 0"):
        yield from (Job(cell, "sgd", V, A, branches, ddp="find_unused_parameters") for V, A in ((1, 1), (2, 1), (1, 2)))
    for averaged in (False, True) if CELLS[cell].config.is_fresh and CELLS[cell].config.is_local else (False,):
        for V in (1, 2):
            for branches in ("all", "not spare"):
                yield Job(cell, "sgd", V, branches=branches, ddp="static_graph", averaged=averaged)
            for set_to_none in (True, False):
                yield Job(cell, "sgd", V, ddp="gradient_as_bucket_view", averaged=averaged, set_to_none=set_to_none)
    yield from (Job(cell, accumulation=A, rows=(7, 3)) for A in (1, 2))
    yield from (Job(cell, accumulation=A, steps=steps) for A, steps in ((1, (9, 6)), (1, (4, 9)), (2, (5, 9))))


def resumed(which: str) -> Iterator[Job]:
    """Unbroken runs, and the same ones saved and resumed at step 4."""
    yield from (Job(cell, virtual_workers=2, stop_at=stop_at) for cell in RESUMED[which] for stop_at in (None, 4))


def hooked(cell: str) -> Iterator[Job]:
    yield from (Job(cell, "sgd", V, A, hook=hook) for hook in ("bf16", "PowerSGD") for V, A in ((1, 1), (2, 1), (1, 2)))


FEW = ("extrap", "extrap-past")
"""A fresh and a past direction: `make test` gives these all variants, and `make test-all` the others too."""
MANY = [scheme for scheme in SCHEMES if scheme not in FEW]
RESUMED = {
    "few": ("extrap", "past-update", "extrap-past-auto", "gaussian"),
    "matrix": ("extrap-past", "optimistic", "smoothout-global"),
}
STOPPED = Job("extrap-past", stop_at=4)
PRESETS = ("none", "extrap", "extrap-past", "extragradient", "optimistic", "past-update", "sam", "asam")
FOUR = ("none", "extrap", "extrap-past", "past-update", "gaussian")
JOBS: dict[str, list[Job]] = {
    "few": [
        *(Job(cell) for cell in CELLS),
        *(job for cell in FEW for job in variants(cell)),
        *(Job(cell, averaged=True) for cell in ("extrap", "extrap-past-auto", "extragradient")),
        *(Job(cell, poisoned=True) for cell in ("extrap-past", "optimistic", "past-update", "extrap")),
        *(Job(cell, virtual_workers=2, poisoned=True) for cell in ("extrap-past", "optimistic")),
        *resumed("few"),
        STOPPED,
    ],
    "hooked": [job for cell in FEW for job in hooked(cell)],
    "four": [Job(cell, world_size=4) for cell in FOUR],
    "matrix": [
        *(job for cell in MANY for job in variants(cell)),
        *(Job(cell, "adamw") for cell in CELLS),
        *resumed("matrix"),
    ],
    "matrix of hooks": [job for cell in MANY for job in hooked(cell)],
    "matrix of four": [
        *(Job(cell, world_size=4) for cell in (*PRESETS, *NOISE) if cell not in FOUR),
        *(Job(cell, "adamw", world_size=4) for cell in PRESETS),
        *(
            Job(f"{cell}-auto", base, world_size=4)
            for cell in ("extrap", "extrap-past", "optimistic")
            for base in BASES
        ),
    ],
}
JOBS = {name: list(dict.fromkeys(jobs)) for name, jobs in JOBS.items()}
JOBS["replicas"] = [Job(cell) for cell in ("extrap", "extrap-past", "extrap-past-auto", "asam", "smoothout")] + [
    Job(cell) for cell in ("extragradient", "optimistic-auto", "past-update", "gaussian-global")
]
