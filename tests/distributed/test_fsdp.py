"""FSDP2 in plain loops: sharded processes are one process, and their forward passes are at y."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from hf_extrap import Extrapolated
from tests.support.fsdp_problem import (
    SCHEMES,
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
from tests.support.plain_loop import Run, assert_same_run, distance, identical, sgd

pytestmark = pytest.mark.distributed


JOBS = {
    "few": [
        Job("none", "adamw"),
        Job("extragradient", "adamw", offload=True),
        Job("extragradient-auto", max_grad_norm=0.05),
        Job("optimistic", accumulation=2),
        Job("optimistic", virtual_workers=2),
        Job("optimistic, step"),
        Job("past-update", "adamw"),
        Job("gaussian, unscaled"),
    ],
    "matrix": [
        *(Job(scheme, "adamw") for scheme in ("extragradient", "optimistic", "gaussian, shared")),
        *(Job(scheme, accumulation=2) for scheme in ("extragradient", "past-update")),
        Job("optimistic", max_grad_norm=0.05),
        Job("past-update", "adamw", offload=True),
    ],
}


def run_job(job: Job) -> dict[str, Any]:
    """What this process saw."""
    model = sharded(offload_policy=CPUOffloadPolicy(pin_memory=False) if job.offload else OffloadPolicy())
    run, optimizer = train(model, job, range(job.virtual_workers), batch_of_rank)
    return what_ran(model, optimizer, run)


def batch_of_rank(step: int, worker: int, index: int) -> tuple[Tensor, Tensor]:
    """This process's half of what the two of them see as one."""
    return batch_of_process(step, worker, index, dist.get_rank())


def backward(model: nn.Module, step: int = 0) -> None:
    inputs, labels = batch_of_process(step, 0, 0, dist.get_rank())
    nn.functional.cross_entropy(model(inputs).float(), labels).backward()


def used_in_forward(mp_policy: MixedPrecisionPolicy, follows: bool = True) -> dict[str, Any]:
    """Weights held and used at y after an evaluation; without `follows` the engine is not notified of moves."""
    model = sharded(mp_policy=mp_policy)
    optimizer = connected(model, "gaussian, shared")
    params: dict[str, Any] = dict(model.named_parameters())
    if not follows:
        optimizer.engine.moved = lambda: None  # type: ignore[method-assign]
    with torch.no_grad():
        model(torch.ones(2, 5))
    x = {"last": model.seen["last"].clone(), "scale": model.seen["scale"].clone()}
    optimizer.train()
    y = {name: params[full].full_tensor().detach() for name, full in (("last", "last.weight"), ("scale", "scale"))}
    backward(model)
    used = {name: value.clone() for name, value in model.seen.items()}
    dtypes = [str(p.dtype) for p in params.values()]
    optimizer.step()
    return {"x": x, "y": y, "used": used, "dtypes": dtypes}


def errors() -> dict[str, str]:
    """What is said to a scheme or a loop that FSDP2 cannot carry out."""
    said = {}
    model = sharded()
    for name, act in {
        **{scheme: partial(connected, model, scheme) for scheme in ("extrap", "extrap-past", "sam")},
        "unconnected": Extrapolated(sgd(list(model.parameters())), SCHEMES["gaussian, shared"]).train,
        "kept": lambda: probe_without_reduction(model),
    }.items():
        try:
            act()
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)
    return said


def probe_without_reduction(model: Network) -> None:
    optimizer = connected(model, "extragradient")
    model.set_requires_gradient_sync(False)
    with optimizer.probing():
        backward(model)


def given_up() -> dict[str, Any]:
    """A step whose gradients are cleared is counted, and leaves x."""
    model = sharded()
    optimizer = connected(model, "optimistic")
    optimizer.train()
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    x = local(list(model.parameters()))
    optimizer.train()
    y = local(list(model.parameters()))
    backward(model, 1)
    optimizer.zero_grad()
    optimizer.restore()
    after = local(list(model.parameters()))
    return {"x": x, "y": y, "after": after, "skipped": optimizer.skipped_steps, "steps": optimizer.step_count}


def in_processes(folder: Path, which: str) -> dict[str, Any]:
    dist.init_process_group("gloo")
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen: dict[str, Any] = {str(job): run_job(job) for job in JOBS[which]}
    if which == "matrix":
        return seen
    seen |= {
        "followed": used_in_forward(MixedPrecisionPolicy()),
        "unfollowed": used_in_forward(MixedPrecisionPolicy(), follows=False),
        "bf16": used_in_forward(bf16),
        "errors": errors(),
        "given up": given_up(),
    }
    return seen


Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen_of(tmp_path_factory: pytest.TempPathFactory, run_processes: Callable[..., Any]) -> Callable[[str], Seen]:
    """What each of the two processes saw."""
    return cache(lambda which: run_processes(__name__, tmp_path_factory.mktemp("fsdp"), which))


@pytest.fixture
def seen(seen_of: Callable[[str], Seen]) -> Seen:
    return seen_of("few")


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


@each(JOBS, "job")
def test_shards_of_uneven_size_are_the_whole(job: Job, which: str, seen_of: Callable[[str], Seen]) -> None:
    """Every x and y is that of one process, with accumulation, clipping and offloading too."""
    expected = train(Network(), job, range(job.virtual_workers), batch_of_worker)[0]
    assert_same_run(gathered([rank[str(job)] for rank in seen_of(which)]), expected, 1e-5)


def test_noise_does_not_depend_on_the_engine(seen: Seen) -> None:
    """The first y, bit for bit, where no norm scales the noise: norms of shards are summed in another order."""
    job = Job("gaussian, unscaled")
    expected = train(Network(), job, range(1), batch_of_worker)[0]
    assert identical(gathered([rank[str(job)] for rank in seen]).y[0][0], expected.y[0][0])


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
        for local_scheme in ("extrap", "extrap-past", "sam"):
            said = rank["errors"][local_scheme]
            assert "scope is 'local', but the parameters are sharded" in said and "allowed: scope 'global'" in said
        assert "call optimizer.connect(model)" in rank["errors"]["unconnected"]
        assert "set_requires_gradient_sync(True)" in rank["errors"]["kept"]


def test_a_step_given_up_leaves_x_and_is_counted(seen: Seen) -> None:
    for rank in seen:
        run: dict[str, Any] = rank["given up"]
        moved: list[Tensor] = run["y"]
        assert distance(run["x"][1:2], moved[1:2]) > 1e-3 and identical(run["x"], run["after"])
        assert (run["skipped"], run["steps"]) == (1, 1)
