"""HSDP: a replica group of processes is a worker, with a y of its own, and two of them are two virtual workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.fsdp_problem import SCHEMES, STEPS, Job, Network, batch_of_worker, joined
from tests.support.hsdp_problem import JOBS, in_one_process
from tests.support.plain_loop import BASES, Run, assert_same_run, distance, identical

pytestmark = pytest.mark.distributed

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, launch_here: Callable[..., Any]) -> Seen:
    """What each of the four processes saw: two replica groups, 0 and 1, 2 and 3."""
    return launch_here("hsdp_processes.py", tmp_path_factory.mktemp("hsdp"), left="hsdp", processes=4)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_replica_groups_are_workers(job: Job, seen: Seen) -> None:
    """Every x and every worker's y of four processes is that of virtual workers in one."""
    ranks = [rank[str(job)] for rank in seen]
    for rank in ranks:
        assert (rank["world_size"], rank["mesh"], rank["engine"], rank["modules"]) == (4, [(2, 2)], "HSDP", 2)
        assert rank["placements"] == ["(Replicate(), Shard(dim=0))"] and rank["sharded"] == 7
    order = [(v, 2 * replica) for v in range(job.virtual_workers) for replica in (0, 1)]
    ys = [[joined(ranks[r]["y"][t][v], ranks[r + 1]["y"][t][v]) for v, r in order] for t in range(STEPS)]
    x = [joined(ranks[0]["x"][t], ranks[1]["x"][t]) for t in range(STEPS + 1)]
    assert_same_run(Run(x=x, y=ys), in_one_process(job), 1e-5)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_replicas_stay_alike(job: Job, seen: Seen) -> None:
    """x agrees over the replicas bit for bit; y differs between them in local scope, and there alone."""
    ranks = [rank[str(job)] for rank in seen]
    for one, other in ((0, 2), (1, 3)):
        assert all(identical(ranks[one]["x"][t], ranks[other]["x"][t]) for t in range(STEPS + 1))
    apart = max(distance(ranks[0]["y"][t][0][:1], ranks[2]["y"][t][0][:1]) for t in range(STEPS))
    assert (apart > 1e-4) == (job.config.is_local and job.config.direction != "none")


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
    optimizer = Extrapolated(
        BASES["sgd"](list((model := Network()).parameters())), SCHEMES["extrap"], virtual_workers=2
    )
    optimizer.collect_statistics = True

    def backward(k: int) -> None:
        inputs, labels = batch_of_worker(0, k, 0)
        (torch.nn.functional.cross_entropy(model(inputs), labels) / 2).backward()

    for k in range(2):
        with optimizer.probing(worker=k):
            backward(k)
        optimizer.train(worker=k)
        backward(k)
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
