"""Invariant 3: after every step x is bit-identical on all ranks; in local scope y differs between ranks during a step.

Two processes and a representative subset of the schemes; tests/distributed runs all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support import ddp_problem
from tests.support.ddp_problem import JOBS, Job
from tests.support.plain_loop import distance, identical


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, run_processes: Callable[..., Any]) -> list[dict[str, Any]]:
    """What each rank saw."""
    return run_processes(ddp_problem.__name__, tmp_path_factory.mktemp("replicas"), "replicas")


@pytest.mark.distributed
@pytest.mark.parametrize("job", JOBS["replicas"], ids=str)
def test_x_is_the_same_on_all_ranks_and_y_in_global_scope_alone(job: Job, ranks: list[dict[str, Any]]) -> None:
    a, b = (rank[str(job)] for rank in ranks)
    assert a["wrapped"] == b["wrapped"] == "DistributedDataParallel" and a["world_size"] == b["world_size"] == 2
    assert len(a["x"]) == 10 and distance(a["x"][0], a["x"][-1]) > 0.01
    assert all(identical(x, other) for x, other in zip(a["x"], b["x"], strict=True))
    (y,), (other,) = a["y"][5], b["y"][5]
    assert distance(y, other) > 1e-4 if job.config.is_local else identical(y, other)
