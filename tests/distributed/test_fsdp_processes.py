"""FSDP2 in plain loops and through accelerate: sharded processes are one process, and their forward passes are at y."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.fsdp_processes import JOBS
from tests.support.fsdp_problem import STEPS, Job, Network, batch_of_worker, joined, train
from tests.support.plain_loop import Run, assert_same_run, distance, identical

pytestmark = pytest.mark.distributed

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, launch_here: Callable[..., Any]) -> Seen:
    """What each of the two processes saw."""
    return launch_here("fsdp_processes.py", tmp_path_factory.mktemp("fsdp"), left="fsdp")


def gathered(ranks: list[dict[str, Any]]) -> Run:
    """The run of two processes, their parts put together."""
    for rank in ranks:
        assert (rank["world_size"], rank["engine"], rank["mesh"], rank["sharded"]) == (2, "FSDP2", [(2,)], 7)
        assert rank["placements"] == ["(Shard(dim=0),)"] and rank["modules"] == 2
    sizes = [[len(p) for p in rank["x"][0]] for rank in ranks]
    assert sizes[0][1:3] == [4, 4] and sizes[1][1:3] == [3, 3] and 0 in sizes[1]
    x = [joined(*(rank["x"][t] for rank in ranks)) for t in range(STEPS + 1)]
    ys = [[joined(*(rank["y"][t][v] for rank in ranks)) for v in range(len(ranks[0]["y"][t]))] for t in range(STEPS)]
    return Run(x=x, y=ys)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_shards_of_uneven_size_are_the_whole(job: Job, seen: Seen) -> None:
    """Every x and y is that of one process, with accumulation, clipping and offloading too."""
    expected = train(Network(), job, range(job.virtual_workers), batch_of_worker)[0]
    assert_same_run(gathered([rank[str(job)] for rank in seen]), expected, 1e-5)


def test_noise_does_not_depend_on_the_engine(seen: Seen) -> None:
    """The first y, bit for bit, where no norm scales the noise: norms of shards are summed in another order."""
    job = Job("gaussian, unscaled")
    expected = train(Network(), job, range(1), batch_of_worker)[0]
    assert identical(gathered([rank[str(job)] for rank in seen]).y[0][0], expected.y[0][0])


@pytest.mark.parametrize("scheme", ["extragradient", "optimistic", "past-update", "gaussian, shared"])
def test_accelerate_trains_as_one_process(scheme: str, seen: Seen) -> None:
    ranks = [rank["accelerate"][scheme] for rank in seen]
    assert {rank["wrapper"] for rank in ranks} == {"AcceleratedOptimizer"}
    expected = train(Network(), Job(scheme, "adamw"), range(1), batch_of_worker)[0]
    assert_same_run(gathered(ranks), expected, 1e-5)


def test_a_forward_pass_after_an_evaluation_is_at_y(seen: Seen) -> None:
    """An evaluation leaves the root's weights gathered: unless they are dropped, the next pass takes x for y."""
    for rank in seen:
        for name in ("last", "scale"):
            followed, missed = rank["followed"], rank["unfollowed"]
            assert torch.equal(followed["used"][name], followed["y"][name])
            assert distance([missed["y"][name]], [missed["x"][name]]) > 1e-3
            assert torch.equal(missed["used"][name], missed["x"][name])


def test_bfloat16_weights_are_y_rounded_once(seen: Seen) -> None:
    """Shards and moves are float32; what is gathered is cast."""
    for rank in seen:
        run = rank["bf16"]
        assert set(run["dtypes"]) == {"torch.float32"}
        for name, y in run["y"].items():
            assert run["used"][name].dtype == torch.bfloat16
            assert torch.equal(run["used"][name], y.to(torch.bfloat16))
            assert not torch.equal(run["used"][name], run["x"][name])


def test_what_fsdp2_cannot_carry_out_is_refused(seen: Seen) -> None:
    for rank in seen:
        assert "scope is 'local', but the parameters are sharded" in rank["errors"]["local"]
        assert "call optimizer.connect(model)" in rank["errors"]["unconnected"]
        assert "set_requires_gradient_sync(True)" in rank["errors"]["kept"]


def test_a_step_given_up_leaves_x_and_is_counted(seen: Seen) -> None:
    for rank in seen:
        run: dict[str, Any] = rank["given up"]
        moved: list[Tensor] = run["y"]
        assert distance(run["x"][1:2], moved[1:2]) > 1e-3 and identical(run["x"], run["after"])
        assert (run["skipped"], run["steps"]) == (1, 1)
