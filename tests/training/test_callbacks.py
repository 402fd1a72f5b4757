"""A run that diverges is stopped at once and is not evaluated."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from hf_extrap.cli import main
from hf_extrap.recipes.run_folder import RunFolder
from hf_extrap.training.arguments import ExtrapTrainingArguments
from hf_extrap.training.callbacks import DivergenceStopper


@pytest.mark.parametrize(
    ("losses", "factor", "warmup_steps", "step"),
    [
        ([2.0, 1.0, 5.9, 1.0], 3.0, 0, None),
        ([2.0, 1.0, 6.1, 1.0], 3.0, 0, 3),
        # A peak during the warm-up may pass; one that stays is seen when it is over.
        ([2.0, 7.0, 7.0, 1.0], 3.0, 3, None),
        ([2.0, 7.0, 7.0, 7.0], 3.0, 3, 4),
        ([2.0, math.nan, 1.0], 3.0, 3, 2),
        ([2.0, 1e9, math.inf], None, 0, 3),
    ],
)
def test_when_training_is_ended(
    losses: list[float], factor: float | None, warmup_steps: int, step: int | None, tmp_path: Path
) -> None:
    arguments = ExtrapTrainingArguments(str(tmp_path), warmup_steps=warmup_steps, use_cpu=True)
    stopper, state, control = DivergenceStopper(factor), TrainerState(max_steps=100), TrainerControl()
    # One loss is logged a step.
    for state.global_step, loss in enumerate(losses, 1):
        control.should_evaluate = True
        stopper.on_log(arguments, state, control, {"loss": loss})
        if control.should_training_stop:
            break
    ended = state.global_step if control.should_training_stop else None
    assert ended == step and control.should_evaluate == (ended is None)


def test_a_diverged_run_is_cut_short(tiny_language_model: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = ["train", str(tiny_language_model), "--output_dir", str(folder.path), "--learning_rate", "1e30"]
    words += ["--abort_factor", "3", "--save_model", "false", "--save_strategy", "no", "--max_grad_norm", "0"]
    assert main([*words, "--eval_strategy", "epoch"]) == 0
    metrics = folder.read_metrics()
    assert metrics["status"] == "diverged"
    assert metrics["diverged_at"] == metrics["steps"] == 2
    assert (metrics["eval"], metrics["test"]) == ({}, None)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        *("_run.lock", "history.jsonl", "metrics.json", "run.json"),
    ]
