"""Invariant 3: after every step x is the same on all ranks, bit for bit; in local scope y differs during a step.

Two processes, and a cut through the schemes; tests/distributed goes through all of them.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.plain_loop import distance, identical
from tests.support.processes import JOBS, Job, launch

LOCAL = ["extrap", "extrap-past", "extrap-past-auto", "asam", "smoothout"]
GLOBAL = ["extragradient", "optimistic-auto", "past-update", "gaussian-global"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What either rank saw."""
    return launch(tmp_path_factory.mktemp("replicas"), 2, [job for job in JOBS if job.cell in LOCAL + GLOBAL])


@pytest.mark.distributed
@pytest.mark.parametrize("cell", LOCAL + GLOBAL)
def test_replicas_agree_at_rest(cell: str, seen: list[dict[str, dict[str, Any]]]) -> None:
    a, b = (rank[str(Job(cell))] for rank in seen)
    assert a["wrapped"] == b["wrapped"] == "DistributedDataParallel" and a["world_size"] == b["world_size"] == 2
    assert len(a["x"]) == 10 and distance(a["x"][0], a["x"][-1]) > 0.01
    assert all(identical(x, other) for x, other in zip(a["x"], b["x"], strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("cell", LOCAL + GLOBAL)
def test_replicas_look_apart_in_local_scope_alone(cell: str, seen: list[dict[str, dict[str, Any]]]) -> None:
    (a,), (b,) = (rank[str(Job(cell))]["y"][5] for rank in seen)
    if cell in LOCAL:
        assert distance(a, b) > 1e-4
    else:
        assert identical(a, b)
