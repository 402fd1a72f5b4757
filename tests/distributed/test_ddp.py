"""K processes with DistributedDataParallel are the textbook's K workers, however DDP is used.

So they are K virtual workers too: tests/invariants/test_4_virtual_workers.py compares these with the same textbook.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_extrap import Extrapolated
from hf_extrap.optim.reference import scaled
from tests.support import ddp_problem
from tests.support.ddp_problem import JOBS, RESUMED, STOPPED, Branching, Job, losses_of, textbook
from tests.support.marks import each
from tests.support.plain_loop import (
    BASES,
    Run,
    assert_same_run,
    distance,
    finishing,
    identical,
    run_steps,
    sgd,
    warm_up_and_decay,
)

pytestmark = pytest.mark.distributed

RanksOf = Callable[[Job], list[dict[str, Any]]]


def of(*names: str) -> list[Any]:
    """The jobs of these names; those of the matrix are marked."""
    marks = {name: pytest.mark.matrix if "matrix" in name else () for name in names}
    return [pytest.param(job, marks=marks[name], id=str(job)) for name in names for job in JOBS[name]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks_of(folder: Path, run_processes: Callable[..., Any]) -> RanksOf:
    """What each rank saw of a job that DDP really ran; one launch for all jobs of a name."""

    @cache
    def launched(name: str) -> list[dict[str, dict[str, Any]]]:
        return run_processes(ddp_problem.__name__, folder / name, name, processes=JOBS[name][0].world_size)

    def ranks_of(job: Job) -> list[dict[str, Any]]:
        ranks = [rank[str(job)] for rank in launched(next(name for name, jobs in JOBS.items() if job in jobs))]
        for rank in ranks:
            assert "error" not in rank, rank["error"]
            assert rank["wrapped"] == "DistributedDataParallel" and rank["world_size"] == job.world_size
        return ranks

    return ranks_of


def gathered(ranks: list[dict[str, Any]], job: Job) -> Run:
    """The run as one process would have seen it; a rank whose batches are spent is left out of y."""
    longest = max(ranks, key=lambda rank: len(rank["x"]))
    ys = [
        [rank["y"][t][v] for v in range(job.virtual_workers) for rank in ranks if t < len(rank["y"])]
        for t in range(len(longest["y"]))
    ]
    return Run(x=longest["x"], y=ys)


@pytest.mark.parametrize("job", of("few", "four", "matrix", "matrix of four"))
def test_processes_are_the_textbook(job: Job, ranks_of: RanksOf) -> None:
    """Every x and every worker's y; x is the same on all ranks to the bit, also after Join."""
    ranks = ranks_of(job)
    expected = textbook(job)
    ys = [[y for k, y in enumerate(ys) if t < job.steps[k % 2]] for t, ys in enumerate(expected.y)]
    assert_same_run(gathered(ranks, job), Run(x=expected.x, y=ys), 1e-11)
    assert [rank["skipped"] for rank in ranks] == [job.poisoned] * job.world_size
    for rank in ranks:
        assert identical(ranks[0]["end"], rank["end"])
        assert all(identical(a, b) for a, b in zip(ranks[0]["x"], rank["x"], strict=False))


@pytest.mark.parametrize("job", [p for p in of("four", "matrix of four") if p.values[0].cell != "none"])
def test_y_differs_between_ranks_in_local_scope_alone(job: Job, ranks_of: RanksOf) -> None:
    run = gathered(ranks_of(job), job)
    assert distance(run.y[5][0], run.x[5]) > 1e-4
    if job.config.is_local:
        assert min(distance(run.y[5][a], run.y[5][b]) for a in range(4) for b in range(a)) > 1e-4
    else:
        assert all(identical(ys[0], y) for ys in run.y for y in ys)


@pytest.mark.parametrize("job", of("hooked", "matrix of hooks"))
def test_a_communication_hook_averages_every_step_once(job: Job, ranks_of: RanksOf) -> None:
    """Probes of local directions do not call it; global directions are averaged by it too."""
    ranks = ranks_of(job)
    averages = 18 if job.cell == "extragradient" else 9
    assert [len(rank["calls"]) for rank in ranks] == [averages] * 2
    assert all(identical(a, b) for a, b in zip(*(rank["x"] for rank in ranks), strict=True))
    off = [distance(a, b) for a, b in zip(ranks[0]["x"], textbook(job).x, strict=True)]
    # PowerSGD begins with two plain averages.
    first = 0 if job.hook == "bf16" else 2 * 9 // averages
    assert max(off[: first + 1]) < 1e-11 and off[first + 1] > 1e-5
    assert max(off) < {"bf16": 0.005, "PowerSGD": 0.5}[job.hook]


def has_own_gradient(job: Job) -> bool:
    return job.config.is_local and job.config.direction in ("gradient", "past_gradient")


@pytest.mark.parametrize("job", [p for p in of("hooked", "matrix of hooks") if has_own_gradient(p.values[0])])
def test_a_local_direction_is_the_gradient_before_the_hook(job: Job, ranks_of: RanksOf) -> None:
    """y = x − η · S(g) with g the worker's own gradient in full precision, however coarse the average is."""
    run, model = gathered(ranks_of(job), job), Branching()
    losses = losses_of(model, job)

    def gradient(point: list[torch.Tensor], step: int, k: int) -> list[torch.Tensor]:
        leaves = [p.clone().requires_grad_() for p in point]
        return list(torch.autograd.grad(losses[k](leaves, step, False), leaves))

    optimizer = BASES["sgd"](list(model.parameters()))
    scheduler = warm_up_and_decay(optimizer)
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
        assert t == 0 or distance(ys[0], x) > 1e-5
        optimizer.step()
        scheduler.step()


@each(RESUMED, "cell")
def test_resuming_changes_no_bit_on_any_rank(cell: str, which: str, ranks_of: RanksOf) -> None:
    runs = [ranks_of(Job(cell, virtual_workers=2, stop_at=stop_at)) for stop_at in (None, 4)]
    for whole, resumed in zip(*runs, strict=True):
        assert all(identical(a, b) for a, b in zip(whole["x"], resumed["x"], strict=True))
        for ys, resumed_ys in zip(whole["y"], resumed["y"], strict=True):
            assert all(identical(a, b) for a, b in zip(ys, resumed_ys, strict=True))


@pytest.mark.parametrize("virtual_workers", [1, 2])
def test_a_checkpoint_of_two_processes_in_one(
    virtual_workers: int, ranks_of: RanksOf, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The local direction is cold, with a warning; x, the momentum and the schedule are kept."""
    ranks_of(STOPPED)
    model, V = Branching(), virtual_workers
    params = list(model.parameters())
    optimizer = Extrapolated(sgd(params), STOPPED.config, virtual_workers=V)
    scheduler = warm_up_and_decay(optimizer)
    weights, shared, schedule = torch.load(folder / "few" / f"{STOPPED}.pt", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(shared)
    optimizer.load_local_state_dict(torch.load(folder / "few" / f"{STOPPED}.0.pt", weights_only=True))
    scheduler.load_state_dict(schedule)
    for index, state in shared["state"].items():
        assert torch.equal(optimizer.state_dict()["state"][index]["momentum_buffer"], state["momentum_buffer"])

    def backward(step: int, v: int, index: int, probe: object) -> None:
        (ddp_problem.loss_of(model, STOPPED, step, v, index) / V).backward()

    run = run_steps(params, optimizer, backward, finishing(optimizer, params, scheduler), first=4, steps=2)
    assert [distance(y, run.x[0]) for y in run.y[0]] == [0] * V
    assert min(distance(y, run.x[1]) for y in run.y[1]) > 1e-4
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "cold" in warning and "world_size was 2 and is 1" in warning
