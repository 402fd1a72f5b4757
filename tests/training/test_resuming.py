"""Resuming: a finished run, the history of an interrupted one, and checkpoints that lack a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer

from tests.support.tiny_trainer import gpt2, train, weights
from tests.training.logged import history

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "extrap_virtual_workers": 2}
ADAM: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.01, "extrap_max_displacement": 2.0}
INDEPENDENT: dict[str, Any] = {"extrap": "extrap", "extrap_batch": "independent", "extrap_step_ratio": 0.5}
MEASURED: dict[str, Any] = {"sharpness_batches": 2, "eval_strategy": "steps", "eval_steps": 2}
PAST: dict[str, Any] = {"extrap": "extrap-past"}
RUNS: dict[str, dict[str, Any]] = {
    "step size auto": {**PAST, "extrap_step_size": "auto", **ADAM},
    "fresh": {"extrap": "extrap", **ADAM},
    "independent samples": INDEPENDENT,
    "batched workers": {**PAST, "batch_workers": True},
    "sharpness": {**PAST, **ADAM, **MEASURED},
    "lamb": {**PAST, "base_optimizer": "lamb", "optim": "adamw_torch_fused", "weight_decay": 0.1},
}
MATRIX: dict[str, dict[str, Any]] = {
    **{
        f"{preset}, auto": {"extrap": preset, "extrap_step_size": "auto", **ADAM} for preset in ("optimistic", "extrap")
    },
    **{preset: {"extrap": preset, **ADAM} for preset in ("extrap-past", "optimistic", "past-update", "smoothout")},
    "past-update, auto": {"extrap": "past-update", "extrap_step_size": "auto", **ADAM},
    **{name: {**RUNS["lamb"], "base_optimizer": name} for name in ("lars", "nadam")},
}


@pytest.mark.parametrize("run", [*RUNS, *(pytest.param(name, marks=pytest.mark.matrix) for name in MATRIX)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, run: str) -> None:
    """With its weights, and with its history: losses, moves, noise scale, evaluations, sharpness."""
    dropout = 0.0 if run == "batched workers" else 0.1
    fields = {**SAVING, **(RUNS | MATRIX)[run]}
    whole = train(tmp_path / "whole", model=gpt2(dropout), **fields)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = train(tmp_path / "resumed", model=gpt2(dropout), resume=checkpoint, **fields)
    assert torch.equal(weights(resumed), weights(whole))
    assert history(resumed) == history(whole)
    assert any("extrap/sharpness" in row for row in history(whole)) == (run == "sharpness")


@pytest.mark.parametrize("extrap", [pytest.param("none", marks=pytest.mark.matrix), "extrap-past"])
# 8 steps an epoch: training ends inside an epoch, and at the end of one.
@pytest.mark.parametrize("steps", [6, 8])
def test_a_finished_run_trains_no_further_step(tmp_path: Path, extrap: str, steps: int) -> None:
    fields = {**SAVING, "extrap": extrap, "max_steps": steps}
    whole = train(tmp_path, **fields)
    for _ in range(2):
        resumed = train(tmp_path, resume=str(tmp_path / f"checkpoint-{steps}"), **fields)
        assert resumed.state.global_step == steps
        assert torch.equal(weights(resumed), weights(whole))
        assert history(resumed) == history(whole)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (3, 6, steps)}


@pytest.mark.parametrize("extrap", [pytest.param("none", marks=pytest.mark.matrix), "extrap-past"])
@pytest.mark.parametrize("logging_steps", [4, 7])
def test_a_resumed_history_is_the_uninterrupted_one(tmp_path: Path, extrap: str, logging_steps: int) -> None:
    """The checkpoint lies between two logged rows, and their loss averages over the steps on both sides of it."""
    fields = {**SAVING, "extrap": extrap, "max_steps": 10, "logging_steps": logging_steps}
    whole = train(tmp_path / "whole", model=gpt2(dropout=0.1), **fields)
    for step in (3, 6, 9):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = train(tmp_path / "resumed", model=gpt2(dropout=0.1), resume=checkpoint, **fields)
        assert history(resumed) == history(whole)


def test_a_checkpoint_that_lacks_the_file_of_its_process_is_refused_without_verification(tmp_path: Path) -> None:
    fields = {**SAVING, "extrap": "extrap-past", "checkpoint_integrity": "off"}
    train(tmp_path, **fields)
    checkpoint = tmp_path / "checkpoint-3"
    # As in a checkpoint of two processes whose first file was lost: the other one says how many there were.
    path = checkpoint / "extrap_rank_0.safetensors"
    path.rename(checkpoint / "extrap_rank_1.safetensors")
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3 lacks extrap_rank_0\.safetensors"):
        train(tmp_path / "resumed", resume=str(checkpoint), **fields)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"extrap_rank_0\.safetensors is damaged"):
        train(tmp_path / "resumed", resume=str(checkpoint), **fields)


def test_checkpoints_of_other_trainers_and_processes_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path / "stock", kind=Trainer, **fields)
    resumed = train(tmp_path, extrap="extrap-past", resume=str(tmp_path / "stock" / "checkpoint-3"), **fields)
    assert resumed.state.global_step == 6
    assert "checkpoint-3 holds no extrap_rank file" in caplog.text
    assert "checkpoint-3 has no checkpoint_manifest.json: its files cannot be verified" in caplog.text
    checkpoint = tmp_path / "checkpoint-6"
    path = checkpoint / "extrap_rank_0.safetensors"
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()["facts"]
    save_file(load_file(path), path, metadata={"facts": facts.replace('"processes": 1', '"processes": 2')})
    train(tmp_path / "again", extrap="extrap-past", resume=str(checkpoint), checkpoint_integrity="warn", **fields)
    assert "checkpoint-6 is damaged: extrap_rank_0.safetensors has another checksum" in caplog.text
    assert "the checkpoint has 2 processes and this run 1" in caplog.text
