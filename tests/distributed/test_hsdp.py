"""HSDP: a replica group of processes is a worker, with a y of its own, and two of them are two virtual workers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.support.fsdp_problem import (
    STEPS,
    Job,
    Network,
    batch_of_process,
    batch_of_worker,
    connected,
    joined,
    local,
    sharded,
    train,
    what_ran,
)
from tests.support.marks import each
from tests.support.plain_loop import BASES, Run, assert_same_run, distance, identical, take_passes

pytestmark = pytest.mark.distributed


JOBS = {
    "few": [
        Job("none", "adamw"),
        Job("extrap", "adamw"),
        Job("extrap-past", max_grad_norm=0.05),
        Job("extrap-past, a layer's step", "adamw"),
        Job("extrap-past, on the host", virtual_workers=2),
        Job("optimistic"),
        Job("past-update"),
        Job("gaussian", virtual_workers=2),
        Job("extrap-past", accumulation=2, reduced="at the end"),
        Job("extrap", "adamw", accumulation=2, reduced="all, averaged at the end"),
    ],
    "matrix": [
        *(Job("extrap-past", base) for base in BASES),
        Job("optimistic", "adamw"),
        Job("gaussian, shared", "adamw"),
        *(Job(scheme, "sgd") for scheme in ("extrap, a layer's step", "extrap-auto", "gaussian")),
        *(Job(scheme, virtual_workers=2) for scheme in ("extrap", "extrap-past")),
        *(Job("extrap-past", accumulation=2, reduced=r) for r in ("all", "all, averaged at the end")),
    ],
}


def run_job(job: Job, mesh: DeviceMesh) -> dict[str, Any]:
    """What this process saw."""
    model = sharded(mesh)
    replica, process = mesh.get_local_rank(0), mesh.get_local_rank(1)
    workers = [v * 2 + replica for v in range(job.virtual_workers)]
    run, optimizer = train(model, job, workers, lambda *which: batch_of_process(*which, process))
    return what_ran(model, optimizer, run)


def backward(model: Network, mesh: DeviceMesh) -> None:
    inputs, labels = batch_of_process(0, mesh.get_local_rank(0), 0, mesh.get_local_rank(1))
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()


class OwnReduceScatter:
    """One that a user might set."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False) -> Any:
        return dist.reduce_scatter_single(
            output=output_tensor, input=input_tensor, group=group, op=op, async_op=async_op
        )


def error_of(what: str, mesh: DeviceMesh) -> str:
    """What is said to a loop in which a replica group's own gradient is not to be seen."""
    model = sharded(mesh)
    optimizer = connected(model, "extrap" if what == "probe" else "extrap-past", virtual_workers=2)
    try:
        if what == "divided":
            model.set_gradient_divide_factor(3.0)
        model.set_requires_gradient_sync(what not in ("unreduced", "probe"))
        if what == "probe":
            model.set_requires_gradient_sync(True)
            with optimizer.probing(worker=0):
                backward(model, mesh)
            model.set_requires_gradient_sync(False)
        optimizer.train(worker=0)
        if what == "replaced":
            model.set_custom_reduce_scatter(OwnReduceScatter())
        backward(model, mesh)
        if what == "probe":
            with optimizer.probing(worker=1):
                pass
        optimizer.train(worker=1)
    except RuntimeError as error:
        return str(error)
    return ""


def started_apart(mesh: DeviceMesh) -> list[torch.Tensor]:
    """The shards after `connect` of a model whose replicas start from different weights."""
    model = sharded(mesh)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(dist.get_rank() // 2)
    connected(model, "extrap-past")
    return local(list(model.parameters()))


def statistics(mesh: DeviceMesh) -> dict[str, float]:
    """Of one step of a replica group."""
    model = sharded(mesh)
    optimizer = connected(model, "extrap")
    optimizer.collect_statistics = True
    take_passes(optimizer, lambda *_: backward(model, mesh))
    optimizer.step()
    return optimizer.statistics


def saved(mesh: DeviceMesh) -> dict[str, Any]:
    """A replica group's own directions, as they are saved, and as another optimizer has loaded them."""
    states = []
    for _ in range(2):
        model = sharded(mesh)
        optimizer = connected(model, "extrap-past")
        if not states:
            optimizer.train()
            backward(model, mesh)
            optimizer.step()
        else:
            optimizer.load_local_state_dict(states[0])
        states.append(optimizer.local_state_dict())
    return {"saved": states[0]["directions"], "loaded": states[1]["directions"]}


def in_processes(folder: Path, which: str) -> dict[str, Any]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    seen: dict[str, Any] = {str(job): run_job(job, mesh) for job in JOBS[which]}
    if which == "matrix":
        return seen
    seen["errors"] = {what: error_of(what, mesh) for what in ("unreduced", "probe", "divided", "replaced")}
    seen |= {"started apart": started_apart(mesh), "statistics": statistics(mesh), "saved": saved(mesh)}
    return seen


Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen_of(tmp_path_factory: pytest.TempPathFactory, run_processes: Callable[..., Any]) -> Callable[[str], Seen]:
    """What each of the four processes saw: two replica groups, 0 and 1, 2 and 3."""
    return cache(lambda which: run_processes(__name__, tmp_path_factory.mktemp("hsdp"), which, processes=4))


@pytest.fixture
def seen(seen_of: Callable[[str], Seen]) -> Seen:
    return seen_of("few")


@each(JOBS, "job")
def test_replica_groups_are_workers(job: Job, which: str, seen_of: Callable[[str], Seen]) -> None:
    """Every x and every worker's y is that of virtual workers in one process; replicas agree on x to the bit.

    y differs between replicas in local scope alone.
    """
    ranks = [rank[str(job)] for rank in seen_of(which)]
    for rank in ranks:
        assert (rank["world_size"], rank["mesh"], rank["engine"], rank["modules"]) == (4, [(2, 2)], "HSDP", 2)
        assert rank["placements"] == ["(Replicate(), Shard(dim=0))"] and rank["sharded"] == 7
    order = [(v, 2 * replica) for v in range(job.virtual_workers) for replica in (0, 1)]
    ys = [[joined(ranks[r]["y"][t][v], ranks[r + 1]["y"][t][v]) for v, r in order] for t in range(STEPS)]
    x = [joined(ranks[0]["x"][t], ranks[1]["x"][t]) for t in range(STEPS + 1)]
    for one, other in ((0, 2), (1, 3)):
        assert all(identical(ranks[one]["x"][t], ranks[other]["x"][t]) for t in range(STEPS + 1))
    apart = max(distance(ranks[0]["y"][t][0][:1], ranks[2]["y"][t][0][:1]) for t in range(STEPS))
    assert (apart > 1e-4) == (job.config.is_local and job.config.direction != "none")
    assert_same_run(Run(x=x, y=ys), train(Network(), job, range(2 * job.virtual_workers), batch_of_worker)[0], 1e-5)


def test_replicas_start_alike(seen: Seen) -> None:
    """`connect` gives all of them the first one's weights."""
    parts = [rank["started apart"] for rank in seen]
    assert identical(parts[0], parts[2]) and identical(parts[1], parts[3])
    assert identical(joined(parts[0], parts[1]), list(Network().parameters()))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("unreduced", "would add it to the next one's"),
        ("probe", "would add to the direction"),
        ("divided", "set_gradient_divide_factor"),
        ("replaced", "set_custom_reduce_scatter"),
    ],
)
def test_what_hides_a_groups_gradient_is_refused(what: str, said: str, seen: Seen) -> None:
    for rank in seen:
        assert said in rank["errors"][what]


def test_statistics_are_those_of_virtual_workers(seen: Seen) -> None:
    """The mean over the replica groups is that of two virtual workers."""
    model = Network()
    optimizer = connected(model, "extrap", virtual_workers=2)
    optimizer.collect_statistics = True

    def backward(worker: int, index: int, probe: object) -> None:
        inputs, labels = batch_of_worker(0, worker, 0)
        (torch.nn.functional.cross_entropy(model(inputs), labels) / 2).backward()

    take_passes(optimizer, backward)
    optimizer.step()
    expected = {**optimizer.statistics, "passes": 1.0}
    groups = [seen[0]["statistics"], seen[2]["statistics"]]
    assert groups[0].keys() == expected.keys()
    for name, value in expected.items():
        assert sum(group[name] for group in groups) / 2 == pytest.approx(value, rel=1e-4), name


def test_each_process_saves_its_part_of_its_groups_directions(seen: Seen) -> None:
    states: list[dict[str, dict[str, Tensor]]] = [rank["saved"] for rank in seen]
    for state in states:
        assert state["saved"].keys() == state["loaded"].keys() and len(state["saved"]) == 5
        assert identical(list(state["saved"].values()), list(state["loaded"].values()))
    assert distance([states[0]["saved"]["0.0"]], [states[2]["saved"]["0.0"]]) > 1e-3
