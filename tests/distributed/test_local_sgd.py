"""Post-local SGD in two processes: two virtual workers, replicas that agree between steps, an exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_extrap.recipes.recording import replicas_agree
from tests.support.tiny_trainer import gpt2, train, weights

pytestmark = pytest.mark.distributed


COMMON: dict[str, Any] = {
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.5,
    "max_steps": 9,
    "extrap": "extrap-past",
    "extrap_step_ratio": 0.5,
    "local_steps": 3,
    "local_sgd_start": 0.3,
    "eval_strategy": "steps",
    "eval_steps": 4,
}
CELLS: dict[str, dict[str, Any]] = {
    "nesterov": {"sgd_momentum": 0.9, "sgd_nesterov": True},
    "adamw": {"optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-3},
}


class Replicas(TrainerCallback):
    """Compares the parameters of all processes after every step, as RunRecorder does after every epoch."""

    def __init__(self) -> None:
        self.agreed: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agreed.append(replicas_agree(kwargs["model"]))


def in_processes(folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, fields in CELLS.items():
        for workers in (1, 2):
            replicas = Replicas()
            more = {**COMMON, **fields, "extrap_virtual_workers": workers}
            trainer = train(folder / "out", **more, callbacks=[replicas])
            assert isinstance(trainer.model_wrapped, DistributedDataParallel) and trainer.args.world_size == 2
            seen[f"{name} {workers}"] = weights(trainer)
            seen[f"{name} {workers} agreed"] = replicas.agreed
            logs = trainer.state.log_history
            seen[f"{name} {workers} losses"] = [row["eval_loss"] for row in logs if "eval_loss" in row]
    saving = {**COMMON, **CELLS["adamw"], "save_strategy": "steps", "save_steps": 4}
    seen["whole"] = weights(train(folder / "whole", model=gpt2(dropout=0.1), **saving))
    resume = str(folder / "whole" / "checkpoint-4")
    seen["resumed"] = weights(train(folder / "resumed", model=gpt2(dropout=0.1), resume=resume, **saving))
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local_sgd")


@pytest.fixture(scope="module")
def ranks(folder: Path, run_processes: Callable[..., Any]) -> list[dict[str, Any]]:
    """What the two processes saw."""
    return run_processes(__name__, folder)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_two_processes_are_two_virtual_workers(
    ranks: list[dict[str, Any]], tmp_path: Path, cell: str, workers: int
) -> None:
    alone = train(tmp_path, **{**COMMON, **CELLS[cell]}, extrap_virtual_workers=2 * workers)
    torch.testing.assert_close(weights(alone), ranks[0][f"{cell} {workers}"], rtol=1e-3, atol=1e-5)
    losses = [row["eval_loss"] for row in alone.state.log_history if "eval_loss" in row]
    assert ranks[0][f"{cell} {workers} losses"] == pytest.approx(losses, rel=1e-4) and len(losses) == 3


def test_replicas_agree_after_every_step(ranks: list[dict[str, Any]]) -> None:
    for cell in CELLS:
        for workers in (1, 2):
            assert ranks[0][f"{cell} {workers} agreed"] == [True] * COMMON["max_steps"]
            assert torch.equal(ranks[0][f"{cell} {workers}"], ranks[1][f"{cell} {workers}"])


def test_a_resumed_run_is_bit_identical(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert torch.equal(ranks[0]["resumed"], ranks[0]["whole"])
    files = sorted(path.name for path in (folder / "whole" / "checkpoint-4").glob("local_sgd_rank_*"))
    assert files == ["local_sgd_rank_0.pt", "local_sgd_rank_1.pt"]
