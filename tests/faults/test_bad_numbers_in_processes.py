"""Bad numbers that one process sees are skipped by all, which stop with the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.fault_problem import PRESETS, expected
from tests.support.plain_loop import distance, identical


@pytest.fixture(scope="module")
def ranks(run_processes: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_processes("tests.support.fault_problem", tmp_path_factory.mktemp("faults"))


@pytest.mark.distributed
@pytest.mark.parametrize("preset", PRESETS)
def test_replicas_skip_alike(preset: str, ranks: list[Any]) -> None:
    """Replicas are the same bit for bit; x is that of virtual workers who never saw the faults."""
    one, two = (seen[preset] for seen in ranks)
    probes = preset in ("extrap", "extragradient", "sam")
    assert one["skipped"] == two["skipped"] == (4 if probes else 2) and one["taken"] == 8 - one["skipped"]
    for x, y, calm in zip(one["x"], two["x"], expected(preset), strict=True):
        assert identical(x, y)
        assert distance(x, calm) < 1e-12


@pytest.mark.distributed
def test_all_processes_stop_with_the_same_error(ranks: list[Any]) -> None:
    one, two = (seen["trainer"] for seen in ranks)
    assert one["error"] == two["error"]
    assert "4 steps in a row were skipped up to step 9" in one["error"]
    assert identical(one["x"], two["x"]) and all(torch.isfinite(p).all() for p in one["x"])
    # Of steps 3 to 6 the second process has one finite loss less.
    assert len(one["losses"]) == 2 and one["losses"] == two["losses"] and 3 < one["losses"][1] < 4.5
