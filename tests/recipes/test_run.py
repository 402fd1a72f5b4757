"""One run, end to end: its files, bit-identical resuming, and errors."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_extrap.cli import main
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes import recording
from hf_extrap.recipes.configuration import resolve
from hf_extrap.recipes.models import ExtrapLstmForCausalLM
from hf_extrap.recipes.recording import parameter_checksum, replicas_agree
from hf_extrap.recipes.run_folder import RunFolder


def train(config: Path, folder: Path, *words: str) -> dict[str, Any]:
    """Train by the command line, in this process; return metrics.json."""
    assert main(["train", str(config), "--output_dir", str(folder), *words]) == 0
    return RunFolder(folder).read_metrics()


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not ("runtime" in name or "per_second" in name)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_translation: Path) -> Path:
    """The folder of a finished run, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_translation, folder, "--extrap", "extrap", "--extrap_virtual_workers", "2")
    return folder


def test_metrics_history_and_model_of_a_run(finished: Path) -> None:
    metrics = RunFolder(finished).read_metrics()
    assert (metrics["status"], metrics["task"], metrics["preset"]) == ("finished", "translation", "extrap")
    assert ExtrapConfig.from_dict(metrics["extrap"]) == ExtrapConfig.preset("extrap", seed=42)
    counts = ("steps", "world_size", "virtual_workers", "global_batch")
    assert [metrics[name] for name in counts] == [6, 1, 2, 2]
    assert metrics["optimizer"] == "AdamW"
    assert metrics["ranks_identical"] is True
    assert metrics["peak_learning_rate"] == pytest.approx(3e-3)
    assert metrics["eval"]["eval_bleu"] >= 0 and metrics["test"]["test_bleu"] >= 0
    assert metrics["test"]["num_beams"] == 2
    assert metrics["seconds_per_step"] > 0
    # Every step is logged.
    assert metrics["data_seconds_per_step"] is None
    tokens_per_batch = metrics["facts"]["target_tokens_per_batch"]
    assert metrics["global_batch_units"] == pytest.approx(2 * tokens_per_batch)
    # Two micro-batches per step; the last step of an epoch may have one.
    expected = 2 * tokens_per_batch / metrics["seconds_per_step"]
    assert metrics["tokens_per_second"] == pytest.approx(expected, rel=0.3)
    assert metrics["command"].startswith("hf-extrap train ") and "--extrap extrap" in metrics["command"]
    assert metrics["arguments"]["learning_rate"] == 3e-3
    rows = RunFolder(finished).read_history()
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_bleu" in row] == [3, 6]
    # The first step has no previous step to scale its extrapolation.
    assert [row["extrap/displacement_norm"] > 0 for row in rows if "loss" in row] == [False, *[True] * 5]
    assert metrics["eval"]["eval_loss"] == [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    model = AutoModelForSeq2SeqLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    written = model.generate(**tokenizer("two days", return_tensors="pt"), max_length=8, num_beams=1)
    assert 1 < written.shape[1] <= 8
    assert model.num_parameters() == metrics["facts"]["parameters"]


def test_the_card_is_valid_and_agrees_with_the_metrics(finished: Path) -> None:
    card, metrics = ModelCard.load(finished / "README.md"), RunFolder(finished).read_metrics()
    results = {result.dataset_split: result for result in card.data.eval_results}
    assert results["validation"].metric_value == round(metrics["eval"]["eval_bleu"], 4)
    assert results["test"].metric_value == round(metrics["test"]["test_bleu"], 4)
    assert card.data.language == ["en", "de"]
    assert {"hf_extrap", "arxiv:2006.05720", "extrap:extrap"} <= set(card.data.tags)
    text = card.content
    assert "independent implementation" in text and "2006.05720" in text and "| base optimizer | AdamW |" in text
    changed, given, fields = (yaml.safe_load(block.split("```")[0]) for block in text.split("```yaml\n")[1:])
    assert fields == metrics["extrap"] and changed.items() <= fields.items()
    assert given == {**metrics["arguments"], "output_dir": "run"}
    assert metrics["command"] in text
    assert (finished / text.split("![Training curves](")[1].split(")")[0]).is_file()
    # No value breaks a table cell.
    for line in text.splitlines():
        if line.startswith("|") and "validation BLEU" not in line and "test BLEU" not in line and "loss" not in line:
            cells = line.replace("\\|", "").strip("|").split("|")
            assert len(cells) in (2, 3), line


def test_a_resumed_run_equals_an_uninterrupted_one(finished: Path, tiny_translation: Path, tmp_path: Path) -> None:
    # The files that a run killed after its first checkpoint would have left.
    shutil.copytree(finished / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    shutil.copy(finished / "run.json", tmp_path / "resumed")
    words = ("--extrap", "extrap", "--extrap_virtual_workers", "2", "--resume_from_checkpoint", "true")
    metrics = train(tiny_translation, tmp_path / "resumed", *words)
    whole = RunFolder(finished)
    assert metrics["resumed_from"] == "checkpoint-3"
    assert (tmp_path / "resumed/model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    for name in ("eval", "test"):
        assert without_times(metrics[name]) == without_times(whole.read_metrics()[name])
    rows = [without_times(row) for row in RunFolder(tmp_path / "resumed").read_history() if "train_loss" not in row]
    assert rows == [without_times(row) for row in whole.read_history() if "train_loss" not in row]


def test_folders_and_checkpoints_of_other_runs_are_refused(
    finished: Path, tiny_translation: Path, error_of: Callable[..., str], tmp_path: Path
) -> None:
    before = (finished / "metrics.json").read_bytes()
    base = ("train", tiny_translation, "--output_dir", finished, "--extrap_virtual_workers", 2)
    assert "holds another run: its extrap is 'extrap', not 'sam'" in error_of(*base, "--extrap", "sam")
    assert "holds this run, finished" in error_of(*base, "--extrap", "extrap")
    assert (finished / "metrics.json").read_bytes() == before
    words = ("--d_model", 32, "--output_dir", tmp_path / "other", "--resume_from_checkpoint", finished / "checkpoint-3")
    sentence = error_of("train", tiny_translation, *words)
    assert "checkpoint-3 is of another model" in sentence and "has shape" in sentence
    # At once: before data are read and anything is written.
    for value, missing in (("true", "holds no checkpoint to resume from"), ("nowhere", "nowhere does not exist")):
        new = tmp_path / f"new_{value}"
        assert missing in error_of("train", tiny_translation, "--output_dir", new, "--resume_from_checkpoint", value)
        assert [path.name for path in new.iterdir()] == ["_run.lock"]


def test_a_diverged_run_is_reported(tiny_translation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--learning_rate", "1e30", "--optim", "sgd", "--max_grad_norm", "0", "--max_steps", "3")
    metrics = train(tiny_translation, tmp_path / "run", *words)
    assert metrics["status"] == "diverged"
    assert "The run diverged" in capsys.readouterr().out
    assert "This run diverged" in (tmp_path / "run/README.md").read_text()


def test_a_language_model_learns(tiny_language_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(tiny_language_model, tmp_path / "whole", "--extrap", "extrap-past", "--extrap_virtual_workers", "2")
    # An untrained model is near a uniform guess among 200 words.
    assert 150 < whole["untrained"]["untrained_perplexity"] < 260
    assert whole["eval"]["eval_perplexity"] < whole["untrained"]["untrained_perplexity"] - 5
    assert whole["eval"]["eval_perplexity"] == pytest.approx(math.exp(whole["eval"]["eval_loss"]), rel=0.02)
    assert "validation perplexity" in capsys.readouterr().out
    assert "trust_remote_code=True" in (tmp_path / "whole/README.md").read_text()
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), ExtrapLstmForCausalLM)


def test_without_a_configuration_the_built_in_language_model_is_trained(tmp_path: Path) -> None:
    found = resolve(None, ["--output_dir", str(tmp_path)])
    assert (found.task.name, found.task_arguments.dataset) == ("language_modeling", "builtin")
    assert resolve(None).training_arguments.output_dir == "runs/language_modeling-none-42"


@pytest.mark.distributed
def test_two_processes_train_one_model(tiny_language_model: Path, tmp_path: Path, launch: Callable[..., str]) -> None:
    words = ("train", tiny_language_model, "--extrap", "extrap", "--dropout", "0", "--output_dir", tmp_path / "run")
    shown = launch("-m", "hf_extrap", *words)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["world_size"] == 2
    assert metrics["ranks_identical"] is True
    assert (metrics["steps"], metrics["global_batch"]) == (6, 8)
    # Only one process prints.
    assert shown.count("validation perplexity") == 1 and "replicas identical" in shown
    # Without dropout, whose masks differ, one process with two virtual workers is equal up to rounding.
    words = "--extrap extrap --dropout 0 --extrap_virtual_workers 2 --per_device_eval_batch_size 8".split()
    virtual = train(tiny_language_model, tmp_path / "virtual", *words)
    assert virtual["eval"]["eval_perplexity"] == pytest.approx(metrics["eval"]["eval_perplexity"], rel=1e-5)


def test_replicas_that_differ_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    ours = parameter_checksum(model)
    monkeypatch.setattr(recording, "gather_object", lambda sums: [*sums, ours])
    assert replicas_agree(model)
    with torch.no_grad():
        model.bias[1] = torch.nextafter(model.bias[1], torch.tensor(9.0))
    assert not replicas_agree(model)


@pytest.mark.distributed
def test_each_process_prints_its_error_once(tiny_translation: Path, launch: Callable[..., str]) -> None:
    printed = launch("-m", "hf_extrap", "train", tiny_translation, "--extrap", "bogus", expect=2)
    errors = re.findall(r"hf-extrap:( process 1:)? error: extrap preset is 'bogus'", printed)
    assert errors == [" process 1:", ""]


@pytest.mark.distributed
@pytest.mark.matrix
@pytest.mark.parametrize(("stage", "preset"), [(2, "extrap-past"), (3, "optimistic")])
def test_deepspeed_trains_the_same_model(
    tiny_language_model: Path, tmp_path: Path, launch: Callable[..., str], stage: int, preset: str
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero: dict[str, Any] = dict.fromkeys(names, "auto") | {"zero_allow_untested_optimizer": True}
    zero["zero_optimization"] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    words = ("--extrap", preset, "--dropout", "0")
    given = ("--output_dir", tmp_path / "zero", "--deepspeed", tmp_path / "zero.json")
    launch("tests/support/cpu_deepspeed.py", "train", tiny_language_model, *words, *given)
    metrics = json.loads((tmp_path / "zero/metrics.json").read_text())
    assert (metrics["world_size"], metrics["optimizer"]) == (2, "SGD")
    assert metrics["ranks_identical"] is (True if stage == 2 else None)
    words = (*words, "--extrap_virtual_workers", "2", "--per_device_eval_batch_size", "8")
    virtual = train(tiny_language_model, tmp_path / "virtual", *words)
    # Stage 3 initializes partitioned weights, with other random numbers.
    tolerance = 1e-5 if stage == 2 else 0.05
    assert virtual["eval"]["eval_perplexity"] == pytest.approx(metrics["eval"]["eval_perplexity"], rel=tolerance)
    assert virtual["facts"] == metrics["facts"]


@pytest.mark.parametrize("able", [True, False])
def test_bf16_on_a_cpu_without_it(
    tiny_translation: Path, tiny_language_model: Path, able: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    patch, caplog, error_of = map(request.getfixturevalue, ("monkeypatch", "caplog", "error_of"))
    patch.setattr("hf_extrap.recipes.run.cpu_has_bf16", lambda: able)
    train(tiny_translation, tmp_path / "run", "--bf16", "true", "--max_steps", "1")
    messages = [record.getMessage() for record in caplog.records if record.name == "hf_extrap.recipes.run"]
    assert [("bf16" in text, "--bf16 false" in text) for text in messages] == [(True, True)] * (not able)
    if not able:
        words = ("train", tiny_language_model, "--output_dir", tmp_path / "lstm", "--bf16", "true")
        assert "no LSTM in bf16 for this CPU; allowed: --bf16 false." in error_of(*words)
