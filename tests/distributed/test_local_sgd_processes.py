"""Post-local SGD in two processes: two virtual workers, replicas that agree between steps, an exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.local_sgd_processes import CELLS, COMMON
from tests.support.tiny_trainer import train, weights

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local_sgd")


@pytest.fixture(scope="module")
def ranks(folder: Path, launch_here: Callable[..., Any]) -> list[dict[str, Any]]:
    """What the two processes saw."""
    return launch_here("local_sgd_processes.py", folder, left="local")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_two_processes_are_two_virtual_workers(
    ranks: list[dict[str, Any]], tmp_path: Path, cell: str, workers: int
) -> None:
    alone = train(tmp_path, **{**COMMON, **CELLS[cell]}, extrap_virtual_workers=2 * workers)
    torch.testing.assert_close(weights(alone), ranks[0][f"{cell} {workers}"], rtol=1e-3, atol=1e-5)
    losses = [row["eval_loss"] for row in alone.state.log_history if "eval_loss" in row]
    assert ranks[0][f"{cell} {workers} losses"] == pytest.approx(losses, rel=1e-4) and len(losses) == 3


def test_replicas_agree_at_rest_also_between_averagings(ranks: list[dict[str, Any]]) -> None:
    for cell in CELLS:
        for workers in (1, 2):
            assert ranks[0][f"{cell} {workers} agreed"] == [True] * COMMON["max_steps"]
            assert torch.equal(ranks[0][f"{cell} {workers}"], ranks[1][f"{cell} {workers}"])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert torch.equal(ranks[0]["resumed"], ranks[0]["whole"])
    files = sorted(path.name for path in (folder / "whole" / "checkpoint-4").glob("local_sgd_rank_*"))
    assert files == ["local_sgd_rank_0.pt", "local_sgd_rank_1.pt"]
