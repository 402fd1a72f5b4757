"""DDP as people use it: accumulation, unused parameters, static graphs, communication hooks, uneven batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_extrap.optim.reference import scaled
from tests.support.ddp_problem import EXACT, HOOKED, Branching, Job, loss_of_micro_batch, textbook
from tests.support.plain_loop import BASES, Run, assert_same_run, distance, identical, warm_up_and_decay

pytestmark = pytest.mark.distributed

Seen = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, launch_here: Callable[..., Any]) -> Seen:
    """What the two processes saw, by job."""
    return launch_here("ddp_processes.py", tmp_path_factory.mktemp("ddp"), left="ddp")


def of_job(seen: Seen, job: Job) -> list[dict[str, Any]]:
    """What each rank saw of a job that DDP really ran."""
    ranks = [rank[str(job)] for rank in seen]
    for rank in ranks:
        assert "error" not in rank, rank["error"]
        assert rank["wrapped"] == "DistributedDataParallel" and rank["world_size"] == 2
    return ranks


def gathered(ranks: list[dict[str, Any]], job: Job) -> Run:
    """The run as one process would have seen it; a rank whose batches are spent is left out of y."""
    longest = max(ranks, key=lambda rank: len(rank["x"]))
    ys = [
        [rank["y"][t][v] for v in range(job.virtual_workers) for rank in ranks if t < len(rank["y"])]
        for t in range(len(longest["y"]))
    ]
    return Run(x=longest["x"], y=ys)


@pytest.mark.parametrize("job", EXACT, ids=str)
def test_processes_are_the_textbook(job: Job, seen: Seen) -> None:
    """Every x and every worker's y; the replicas end bit for bit alike, also after Join."""
    ranks = of_job(seen, job)
    expected = textbook(job)
    ys = [[y for k, y in enumerate(ys) if t < job.steps[k % 2]] for t, ys in enumerate(expected.y)]
    assert_same_run(gathered(ranks, job), Run(x=expected.x, y=ys), 1e-11)
    assert identical(*(rank["end"] for rank in ranks))


@pytest.mark.parametrize("job", HOOKED, ids=str)
def test_a_hook_of_the_users_averages_every_step_once(job: Job, seen: Seen) -> None:
    """Local probes leave it alone, with its error feedback; a direction of all is averaged by it too."""
    ranks = of_job(seen, job)
    averages = 18 if job.scheme == "extragradient" else 9
    assert [len(rank["calls"]) for rank in ranks] == [averages] * 2
    assert all(identical(a, b) for a, b in zip(*(rank["x"] for rank in ranks), strict=True))
    off = [distance(a, b) for a, b in zip(ranks[0]["x"], textbook(job).x, strict=True)]
    # PowerSGD begins with two plain averages.
    first = 0 if job.hook == "bf16" else 2 * 9 // averages
    assert max(off[: first + 1]) < 1e-11 and off[first + 1] > 1e-5
    assert max(off) < {"bf16": 0.005, "PowerSGD": 0.5}[job.hook]


LOCAL = [job for job in HOOKED if job.config.is_local and job.config.direction in ("gradient", "past_gradient")]


@pytest.mark.parametrize("job", LOCAL, ids=str)
def test_a_local_direction_is_the_gradient_before_the_hook(job: Job, seen: Seen) -> None:
    """y = x − η · S(g) with g the worker's own gradient in full precision, however coarse the average is."""
    run = gathered(of_job(seen, job), job)
    model = Branching()
    params, names = list(model.parameters()), [name for name, _ in model.named_parameters()]

    def gradient(point: list[Tensor], step: int, k: int) -> list[Tensor]:
        leaves = [p.clone().requires_grad_() for p in point]

        def at(*inputs: Any) -> Tensor:
            return torch.func.functional_call(model, dict(zip(names, leaves, strict=True)), inputs)

        losses = [loss_of_micro_batch(at, job, step, k, index) for index in range(job.accumulation)]
        return list(torch.autograd.grad(torch.stack(losses).mean(), leaves))

    optimizer = BASES["sgd"](params)
    scheduler = warm_up_and_decay(optimizer)
    moved = []
    for t, (x, ys) in enumerate(zip(run.x[:-1], run.y, strict=True)):
        rates = [group["lr"] for group in optimizer.param_groups for _ in group["params"]]
        steps = [job.config.step_size or (job.config.step_ratio or 0) * rate for rate in rates]
        last = [a - b for a, b in zip(x, run.x[t - 1], strict=True)] if t > 0 else None
        for k, y in enumerate(ys):
            d = [torch.zeros_like(p) for p in x]
            if job.config.is_fresh:
                d = gradient(x, t, k)
            elif t > 0:
                d = gradient(run.y[t - 1][k], t - 1, k)
            move = scaled(job.config.scaling, d, x, last)
            expected = [p - step * s for p, step, s in zip(x, steps, move, strict=True)]
            assert distance(y, expected) < 1e-12, f"y of worker {k} at step {t}"
        moved.append(distance(ys[0], x))
        optimizer.step()
        scheduler.step()
    assert min(moved[1:]) > 1e-5
