"""A model with BatchNorm and augmentation in two processes: two virtual workers, running statistics included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_images import buffers, train_images
from tests.support.tiny_trainer import weights

pytestmark = pytest.mark.distributed


CELLS: dict[str, dict[str, Any]] = {
    f"{preset}, {count}": {"extrap": preset, "recalibrate_batch_norm": count}
    for preset in ("none", "extrap", "extrap-past")
    for count in (0, 2)
}
COMMON: dict[str, Any] = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}


def in_processes(folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, fields in CELLS.items():
        trainer = train_images(folder / "out", **fields, **COMMON)
        assert trainer.args.world_size == 2
        seen[name] = {
            "weights": weights(trainer),
            "buffers": buffers(trainer.model),
            "losses": [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row],
        }
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, run_processes: Callable[..., Any]) -> list[dict[str, Any]]:
    """What the two processes saw."""
    return run_processes(__name__, tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("cell", CELLS)
def test_two_processes_are_two_virtual_workers(ranks: list[dict[str, Any]], tmp_path: Path, cell: str) -> None:
    fields = dict(CELLS[cell])
    # A process keeps its own last batches: the virtual workers of one process keep those of both.
    fields["recalibrate_batch_norm"] *= 2
    alone = train_images(tmp_path, extrap_virtual_workers=2, **fields, **COMMON)
    torch.testing.assert_close(weights(alone), ranks[0][cell]["weights"], rtol=1e-3, atol=1e-5)
    names = [name for name, _ in alone.model.named_buffers()]
    assert sum(name.endswith("running_mean") for name in names) == 9
    # Counts are each process's own after a recalibration, and nothing is computed from them.
    counted = torch.cat(
        [torch.full((b.numel(),), name.endswith("num_batches_tracked")) for name, b in alone.model.named_buffers()]
    )
    expected = torch.cat([b.detach().reshape(-1).float() for b in alone.model.buffers()])
    torch.testing.assert_close(ranks[0][cell]["buffers"][~counted], expected[~counted], rtol=1e-3, atol=1e-5)
    losses = [row["eval_loss"] for row in alone.state.log_history if "eval_loss" in row]
    assert ranks[0][cell]["losses"] == pytest.approx(losses, rel=1e-3) and len(losses) == 2
    for name in ("weights", "buffers"):
        assert torch.equal(ranks[0][cell][name], ranks[1][cell][name])
