"""K processes with DistributedDataParallel are K virtual workers, and the textbook's K workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.reference import Trajectory
from tests.support.plain_loop import (
    BASES,
    Run,
    assert_same_run,
    distance,
    identical,
    make_model,
    run_plain_loop,
    run_reference,
    sgd,
    warm_up_and_decay,
)
from tests.support.processes import ACCUMULATED, JOBS, JOBS_OF_TWO, NOISE, Job, launch

pytestmark = pytest.mark.distributed

Seen = list[dict[str, dict[str, Any]]]

ALL = [(2, job) for job in JOBS + JOBS_OF_TWO] + [(4, job) for job in JOBS]
IDS = [f"{job}-{world_size} processes" for world_size, job in ALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_processes")


@pytest.fixture(scope="module")
def seen(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Seen]:
    """What every rank saw, by world size: one launch each, for starting processes is slow."""
    four = tmp_path_factory.mktemp("four_processes")
    return {2: launch(folder, 2, JOBS + JOBS_OF_TWO), 4: launch(four, 4, JOBS)}


def gathered(seen: Seen, job: Job) -> Run:
    """The run as one process would have seen it: worker v · W + r is virtual worker v of rank r."""
    ranks = [rank[str(job)] for rank in seen]
    ys = [[rank["y"][t][v] for v in range(job.virtual_workers) for rank in ranks] for t in range(9)]
    return Run(x=ranks[0]["x"], y=ys)


def virtual(job: Job, workers: int) -> tuple[Run, int]:
    """The same in one process, and the number of skipped steps."""
    model, config = make_model(), job.scheme.config
    base = BASES[job.base]
    optimizer = Extrapolated(base(list(model.parameters())), config, virtual_workers=workers)
    run = run_plain_loop(
        model,
        optimizer,
        config,
        range(workers),
        scheduler=warm_up_and_decay(optimizer),
        max_grad_norm=job.scheme.max_grad_norm,
        batch=job.batch,
    )
    return run, optimizer.skipped_steps


@pytest.mark.parametrize(("world_size", "job"), ALL, ids=IDS)
def test_data_parallelism_is_really_running(world_size: int, job: Job, seen: dict[int, Seen]) -> None:
    for rank in seen[world_size]:
        assert rank[str(job)]["wrapped"] == "DistributedDataParallel"
        assert rank[str(job)]["world_size"] == world_size


@pytest.mark.parametrize(("world_size", "job"), ALL, ids=IDS)
def test_processes_are_virtual_workers(world_size: int, job: Job, seen: dict[int, Seen]) -> None:
    expected, skipped = virtual(job, world_size * job.virtual_workers)
    assert_same_run(gathered(seen[world_size], job), expected, 1e-11)
    assert [rank[str(job)]["skipped"] for rank in seen[world_size]] == [skipped] * world_size
    assert skipped == job.poisoned


TEXTBOOK = [(world_size, job) for world_size, job in ALL if job.cell not in NOISE and not job.poisoned]


@pytest.mark.parametrize(("world_size", "job"), TEXTBOOK, ids=[f"{job}-{size} processes" for size, job in TEXTBOOK])
def test_processes_are_the_reference(world_size: int, job: Job, seen: dict[int, Seen]) -> None:
    expected: Trajectory = run_reference(job.scheme, job.base, world_size * job.virtual_workers, torch.float64)
    assert_same_run(gathered(seen[world_size], job), expected, 1e-11)


@pytest.mark.parametrize(("world_size", "job"), ALL, ids=IDS)
def test_x_is_bit_identical_on_all_ranks(world_size: int, job: Job, seen: dict[int, Seen]) -> None:
    first, *others = [rank[str(job)]["x"] for rank in seen[world_size]]
    assert len(first) == 10
    for other in others:
        assert all(identical(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("cell", ["extrap", "extrap-past", "extrap-auto", "sam", "gaussian", "smoothout"])
def test_y_differs_between_ranks_in_local_scope(cell: str, world_size: int, seen: dict[int, Seen]) -> None:
    ys = gathered(seen[world_size], Job(cell)).y[5]
    assert min(distance(ys[a], ys[b]) for a in range(world_size) for b in range(a)) > 1e-4


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("cell", ["extragradient", "optimistic", "past-update", "optimistic-auto"] + list(NOISE)[2:])
def test_y_is_bit_identical_in_global_scope(cell: str, world_size: int, seen: dict[int, Seen]) -> None:
    run = gathered(seen[world_size], Job(cell))
    assert all(identical(ys[0], y) for ys in run.y for y in ys)
    assert distance(run.y[5][0], run.x[5]) > 1e-4


@pytest.mark.parametrize("cell", ACCUMULATED)
def test_resuming_changes_no_bit_on_any_rank(cell: str, seen: dict[int, Seen]) -> None:
    for rank in seen[2]:
        whole, resumed = (rank[str(Job(cell, virtual_workers=2, stop_at=stop_at))] for stop_at in (None, 4))
        assert all(identical(a, b) for a, b in zip(whole["x"], resumed["x"], strict=True))
        for ys, resumed_ys in zip(whole["y"], resumed["y"], strict=True):
            assert all(identical(a, b) for a, b in zip(ys, resumed_ys, strict=True))


@pytest.mark.parametrize("virtual_workers", [1, 2])
def test_a_checkpoint_of_two_processes_in_one(
    virtual_workers: int, seen: dict[int, Seen], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another world size: the local direction is cold, with a warning; x, the momentum and the schedule go on."""
    job = Job("extrap-past", stop_at=4)
    assert seen[2]
    weights, shared, schedule = torch.load(folder / f"{job}.pt", weights_only=True)
    model, config = make_model(), job.scheme.config
    optimizer = Extrapolated(sgd(list(model.parameters())), config, virtual_workers=virtual_workers)
    scheduler = warm_up_and_decay(optimizer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(shared)
    optimizer.load_local_state_dict(torch.load(folder / f"{job}.0.pt", weights_only=True))
    scheduler.load_state_dict(schedule)
    for index, state in shared["state"].items():
        assert torch.equal(optimizer.state_dict()["state"][index]["momentum_buffer"], state["momentum_buffer"])
    workers = range(virtual_workers)
    run = run_plain_loop(model, optimizer, config, workers, first=4, steps=2, scheduler=scheduler)
    assert [distance(y, run.x[0]) for y in run.y[0]] == [0] * virtual_workers
    assert min(distance(y, run.x[1]) for y in run.y[1]) > 1e-4
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "cold" in warnings[0] and "world_size was 2 and is 1" in warnings[0]
