"""Run by torchrun: two processes do the jobs of `ddp_problem`; a process leaves ddp_R.pt in the folder given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.ddp_problem import EXACT, HOOKED, Branching, Job, run_loop
from tests.support.leaving import save_and_leave
from tests.support.plain_loop import BASES


def communication_hook(name: str) -> tuple[Any, Callable[..., Any]]:
    """The state and the function of a user's hook."""
    if name == "bf16":
        return None, default_hooks.bf16_compress_hook
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1
    )
    return state, powerSGD_hook.powerSGD_hook


def train(job: Job, rank: int) -> dict[str, Any]:
    """What this rank saw: x, every worker's y, x at the end, the calls of the user's hook."""
    model = DistributedDataParallel(Branching(), **dict(job.ddp))
    optimizer = Extrapolated(BASES[job.base](list(model.parameters())), job.config, virtual_workers=job.virtual_workers)
    calls: list[int] = []
    if job.hook:
        state, hook = communication_hook(job.hook)

        def counted(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
            calls.append(bucket.buffer().numel())
            return hook(state, bucket)

        model.register_comm_hook(state, counted)
    workers = [v * 2 + rank for v in range(job.virtual_workers)]
    uneven = Join([model]) if job.steps[0] != job.steps[1] else nullcontext()
    with uneven:
        run = run_loop(model, optimizer, job, workers, job.steps[rank], None if job.averaged else model)
    return {
        "x": run.x,
        "y": run.y,
        "end": [p.detach().clone() for p in model.parameters()],
        "calls": calls,
        "wrapped": type(model).__name__,
        "world_size": dist.get_world_size(model.process_group),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = {}
    for job in EXACT + HOOKED:
        try:
            seen[str(job)] = train(job, dist.get_rank())
        except RuntimeError as error:
            seen[str(job)] = {"error": str(error)}
    save_and_leave(seen, folder, "ddp")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
