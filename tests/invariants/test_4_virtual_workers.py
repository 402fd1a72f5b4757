"""Invariant 4: K virtual workers are the textbook's K workers. (K processes: tests/distributed.)"""

from __future__ import annotations

import pytest
import torch

from tests.support.plain_loop import CELLS, STEPS, assert_same_run, distance, run_reference, run_virtual_workers


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=pytest.mark.matrix) for n in (1, 4))])
@pytest.mark.parametrize("name", CELLS)
def test_virtual_workers_are_the_reference(name: str, workers: int, base: str) -> None:
    cell = CELLS[name]
    actual = run_virtual_workers(cell, base, workers, torch.float64)
    assert_same_run(actual, run_reference(cell, base, workers, torch.float64), 1e-11)


@pytest.mark.matrix
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", CELLS)
def test_virtual_workers_are_the_reference_in_float32(name: str, base: str) -> None:
    cell = CELLS[name]
    actual = run_virtual_workers(cell, base, 2, torch.float32)
    assert_same_run(actual, run_reference(cell, base, 2, torch.float32), 2e-5)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", [name for name in CELLS if name != "none"])
def test_every_scheme_moves_y_and_changes_x(name: str, base: str) -> None:
    """Otherwise the comparison above would be empty."""
    run = run_reference(CELLS[name], base, 2, torch.float64)
    bare = run_reference(CELLS["none"], base, 2, torch.float64)
    moved = max(distance(y, x) for x, ys in zip(run.x, run.y, strict=False) for y in ys)
    assert moved > 1e-4
    assert distance(run.x[STEPS], bare.x[STEPS]) > 1e-5


@pytest.mark.parametrize("name", ["extrap", "extrap-past", "extrap-auto", "extrap-past-auto", "sam"])
def test_workers_differ_in_local_scope_alone(name: str) -> None:
    local = run_virtual_workers(CELLS[name], "sgd", 2, torch.float64)
    assert distance(*local.y[4]) > 1e-4
    shared = run_virtual_workers(CELLS["extragradient"], "sgd", 2, torch.float64)
    assert distance(*shared.y[4]) == 0
