"""Starts real processes over gloo, each training its share of the cells with DistributedDataParallel.

Run by `launch` as `python processes.py FOLDER WORLD_SIZE RANK JOB…`; a process leaves what it saw in FOLDER/rank_R.pt.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.plain_loop import BASES, CELLS, Cell, Run, make_batch, make_model, run_plain_loop, warm_up_and_decay

NOISE = {
    "gaussian": Cell(ExtrapConfig.preset("gaussian", step_size=0.05)),
    "smoothout": Cell(ExtrapConfig.preset("smoothout", step_size=0.05)),
    "gaussian-global": Cell(ExtrapConfig.preset("gaussian", step_size=0.05, scope="global")),
    "smoothout-global": Cell(ExtrapConfig.preset("smoothout", step_size=0.05, scope="global")),
}
PRESETS = ["none", "extrap", "extrap-past", "extragradient", "optimistic", "past-update", "sam", "asam"]
AUTO = ["extrap-auto", "extrap-past-auto", "optimistic-auto"]
ACCUMULATED = [
    "extrap",
    "extrap-past",
    "extragradient",
    "optimistic",
    "past-update",
    *AUTO,
    "gaussian",
    "smoothout-global",
]


@dataclass(frozen=True)
class Job:
    """One run: `virtual_workers` to a process."""

    cell: str
    base: str = "sgd"
    virtual_workers: int = 1
    stop_at: int | None = None  # save here, and go on with objects made anew
    poisoned: bool = False  # worker 1 finds a NaN in its batch of step 3
    ddp: tuple[tuple[str, Any], ...] = field(default=())
    unaveraged: bool = False  # probes are told of the module, and leave out its averaging

    def __str__(self) -> str:
        extra = [f"{self.virtual_workers} virtual"] * (self.virtual_workers > 1)
        extra += ["unaveraged"] * self.unaveraged
        extra += (
            ["resumed"] * (self.stop_at is not None) + ["poisoned"] * self.poisoned + [name for name, _ in self.ddp]
        )
        return "-".join([self.cell, self.base, *extra])

    @property
    def scheme(self) -> Cell:
        return {**CELLS, **NOISE}[self.cell]

    @property
    def batch(self) -> Callable[[int, int, bool], tuple[Tensor, Tensor]]:
        def batch(step: int, worker: int, probe: bool) -> tuple[Tensor, Tensor]:
            inputs, labels = make_batch(step, worker, probe)
            return (
                torch.full_like(inputs, torch.nan) if self.poisoned and (step, worker) == (3, 1) else inputs
            ), labels

        return batch


JOBS = [Job(cell, base) for cell in [*PRESETS, *AUTO] for base in BASES] + [Job(cell) for cell in NOISE]
JOBS_OF_TWO = [
    *(Job(cell) for cell in CELLS if cell not in [*PRESETS, *AUTO]),
    *(Job(cell, virtual_workers=2) for cell in ACCUMULATED),
    *(Job(cell, ddp=(("gradient_as_bucket_view", True),)) for cell in ("extrap", "extrap-past", "optimistic-auto")),
    *(Job(cell, ddp=(("find_unused_parameters", True),)) for cell in ("extrap", "optimistic-auto")),
    *(Job(cell, poisoned=True) for cell in ("extrap-past", "optimistic", "past-update", "extrap")),
    *(Job(cell, virtual_workers=2, poisoned=True) for cell in ("extrap-past", "optimistic")),
    *(Job(cell, virtual_workers=2, stop_at=4) for cell in ACCUMULATED),
    Job("extrap-past", stop_at=4),
    *(Job(cell, unaveraged=True) for cell in ("extrap", "extrap-past-auto", "extragradient")),
]


def train(job: Job, rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """What this rank saw."""
    workers = [v * world_size + rank for v in range(job.virtual_workers)]
    config = job.scheme.config

    def make() -> tuple[DistributedDataParallel, Extrapolated, Any]:
        model = DistributedDataParallel(make_model(), **dict(job.ddp))
        base = BASES[job.base](list(model.parameters()))
        optimizer = Extrapolated(base, config, virtual_workers=job.virtual_workers)
        return model, optimizer, warm_up_and_decay(optimizer)

    def go(first: int, steps: int) -> Run:
        return run_plain_loop(
            model,
            optimizer,
            config,
            workers,
            first=first,
            steps=steps,
            scheduler=scheduler,
            max_grad_norm=job.scheme.max_grad_norm,
            batch=job.batch if job.poisoned else None,
            probe_model=model if job.unaveraged else None,
        )

    model, optimizer, scheduler = make()
    if job.stop_at is None:
        run = go(0, 9)
    else:
        run = go(0, job.stop_at)
        # As a checkpoint does: rank 0 writes what all share, each rank its own part.
        if rank == 0:
            torch.save(
                [model.module.state_dict(), optimizer.state_dict(), scheduler.state_dict()], folder / f"{job}.pt"
            )
        own = copy.deepcopy(optimizer.local_state_dict())
        torch.save(own, folder / f"{job}.{rank}.pt")
        dist.barrier()
        model, optimizer, scheduler = make()
        weights, shared, schedule = torch.load(folder / f"{job}.pt", weights_only=True)
        model.module.load_state_dict(weights)
        optimizer.load_state_dict(shared)
        optimizer.load_local_state_dict(torch.load(folder / f"{job}.{rank}.pt", weights_only=True))
        scheduler.load_state_dict(schedule)
        rest = go(job.stop_at, 9 - job.stop_at)
        run = Run(x=run.x + rest.x[1:], y=run.y + rest.y)
    return {
        "x": run.x,
        "y": run.y,
        "skipped": optimizer.skipped_steps,
        "wrapped": type(model).__name__,
        "world_size": dist.get_world_size(model.process_group),
    }


def launch(folder: Path, world_size: int, jobs: Sequence[Job]) -> list[dict[str, dict[str, Any]]]:
    """Run the jobs with so many processes; what each rank saw, by job."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    numbers = [str((JOBS + JOBS_OF_TWO).index(job)) for job in jobs]
    commands = [
        [sys.executable, __file__, str(folder), str(world_size), str(rank), *numbers] for rank in range(world_size)
    ]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        codes = [process.wait(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world_size
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(world_size)]


def main(folder: Path, world_size: int, rank: int, numbers: Sequence[int]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous_{world_size}"
    dist.init_process_group("gloo", init_method=store, world_size=world_size, rank=rank)
    jobs = [(JOBS + JOBS_OF_TWO)[number] for number in numbers]
    torch.save({str(job): train(job, rank, world_size, folder) for job in jobs}, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [int(number) for number in sys.argv[4:]])
