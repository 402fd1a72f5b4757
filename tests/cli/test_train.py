"""hf-extrap train and init: dry runs, logs that are piped, runs that are finished, and first configurations."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hf_extrap.cli import main
from hf_extrap.lab.dry_run import optimizer_state_bytes, resolved_fields
from hf_extrap.recipes.configuration import resolve
from hf_extrap.recipes.run_folder import RunFolder

ErrorOf = Callable[..., str]
#: 200 words x 16, tied, and a bias each; an LSTM layer of 16 units.
PARAMETERS = 200 * 16 + 200 + 4 * 16 * (16 + 16 + 2)


def printed(*words: str | Path) -> tuple[int, str]:
    """Exit code and standard output of the program."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = main([str(word) for word in words])
    return code, text.getvalue()


def in_processes(folder: Path, config: str, run: str) -> list[tuple[int, str]]:
    """A dry run, and a finished run that is resumed, in each process."""
    planned = printed("train", config, "--extrap", "extragradient", "--dry_run")
    return [planned, printed("train", config, "--output_dir", run, "--resume_from_checkpoint", "true")]


@pytest.fixture(scope="module")
def config(tiny_language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny language model with whatever progress the program chooses."""
    fields = yaml.safe_load(tiny_language_model.read_text())
    del fields["disable_tqdm"]
    path = tmp_path_factory.mktemp("piped") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**fields, "extrap": "extrap-past"}))
    return path


def program(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "hf_extrap", *map(str, words)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def finished(config: Path) -> tuple[Path, subprocess.CompletedProcess[bytes]]:
    """The folder of a run and what the program printed into pipes."""
    return config.parent / "run", program("train", config, "--output_dir", config.parent / "run")


def test_a_piped_log_has_a_plain_line_for_each_row(finished: tuple[Path, Any]) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert b"\r" not in done.stdout + done.stderr and b"\x1b" not in done.stdout + done.stderr
    assert b"it/s" not in done.stderr
    rows = [line for line in done.stdout.decode().splitlines() if line.startswith("{'loss'")]
    assert len(rows) == sum("loss" in row for row in RunFolder(folder).read_history()) == 6
    assert "Language modeling, preset extrap-past" in done.stdout.decode()


def test_a_finished_run_that_is_resumed_prints_its_table_and_succeeds(
    finished: tuple[Path, Any], config: Path, error_of: ErrorOf
) -> None:
    folder = finished[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    words = ("train", config, "--output_dir", folder)
    done = program(*words, "--resume_from_checkpoint", "true", FORCE_COLOR="1")
    assert done.returncode == 0 and "validation perplexity" in done.stdout.decode()
    assert b"\x1b[3m" in done.stdout and b"\r" not in done.stdout + done.stderr
    assert printed(*words, "--resume_from_checkpoint", folder / "checkpoint-3")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert "holds this run, finished" in error_of(*words)
    more = error_of(*words, "--resume_from_checkpoint", "true", "--max_steps", "12")
    assert "holds another run: its max_steps is 6, not 12" in more
    # No checkpoint is needed.
    shutil.copytree(folder, folder.parent / "kept", ignore=shutil.ignore_patterns("checkpoint-*"))
    words = ("train", config, "--output_dir", folder.parent / "kept", "--resume_from_checkpoint")
    assert printed(*words, "true")[0] == 0


@pytest.mark.distributed
def test_two_processes_plan_a_run_and_resume_a_finished_one(
    finished: tuple[Path, Any], config: Path, tmp_path: Path, run_processes: Callable[..., list[Any]]
) -> None:
    (plan, table), (second_plan, second_table) = run_processes(__name__, tmp_path, str(config), str(finished[0]))
    assert plan[0] == table[0] == 0 and second_plan == second_table == (0, "")
    assert "validation perplexity" in table[1]
    # Two all-reduces of all gradients, of which each process of two sends the bytes once.
    size = 4 * PARAMETERS / 1e6
    communicated = f"{size:.3g} MB a step + {size:.3g} MB for the extrapolation; each process sends {2 * size:.3g} MB"
    assert communicated in plan[1] and "2 × 1 virtual workers" in plan[1]


def test_a_dry_run_prints_the_configuration_and_its_cost(config: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--extrap_virtual_workers", "2", "--optim", "adamw_torch", "--hub_token", "hf_" + "a" * 30]
    code, text = printed("train", config, "--dry-run", *words)
    assert code == 0 and list(tmp_path.iterdir()) == []
    rows = dict(re.findall(r"^#   ([\w ]+): +(.*)$", text, re.MULTILINE))
    size = f"{4 * PARAMETERS / 1e6:.3g} MB"
    assert rows["steps"].startswith("6 (") and "1 × 2 virtual workers" in rows["steps"]
    assert rows["samples"] == "8 a step, 48 in all"
    assert rows["parameters"] == f"{PARAMETERS:,}"
    assert rows["memory of parameters"] == rows["memory of gradients"] == rows["memory of x while at y"] == size
    # Two moments, and a step number for each tensor; a direction for each worker.
    assert rows["memory of AdamW"] == rows["memory of directions"] == f"{8 * PARAMETERS / 1e6:.3g} MB"
    assert rows["communication"] == "none, one process"
    # The text is a configuration, of the same run.
    (tmp_path / "again.yaml").write_text(text)
    first, again = resolve(config, words), resolve(tmp_path / "again.yaml")
    assert "hf_aaa" not in text and resolved_fields(again) == resolved_fields(first)
    of_both = [c.training_arguments.to_dict() for c in (first, again)]
    different = {name for name in of_both[0] if of_both[0][name] != of_both[1][name]}
    assert different <= {"hub_token", "logging_dir"}


def test_a_default_that_the_file_resets_stays_reset(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("task: translation\nlabel_smoothing_factor: null\n")
    first = resolve(tmp_path / "first.yaml")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(resolved_fields(first)))
    assert first.training_arguments.label_smoothing_factor == 0.0
    assert resolve(tmp_path / "again.yaml").training_arguments.label_smoothing_factor == 0.0


def test_the_state_of_an_optimizer_is_known_before_its_first_step() -> None:
    model = torch.nn.Linear(30, 20)
    for kind, words in (("SGD", {"momentum": 0.9}), ("SGD", {}), ("AdamW", {"fused": True}), ("Adafactor", {})):
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **words)
        foreseen = optimizer_state_bytes(optimizer)
        model(torch.ones(1, 30)).sum().backward()
        optimizer.step()
        tensors = (tensor for state in optimizer.state.values() for tensor in state.values())
        held = (tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        assert foreseen == sum(held), kind
    assert optimizer_state_bytes(torch.optim.LBFGS(model.parameters())) is None


def write_data(folder: Path, task: str) -> None:
    """A local folder of this task's data, with a few rows."""
    folder.mkdir()
    for split, count in {"train": 40, "validation": 6, "test": 6}.items():
        if task == "language_modeling":
            (folder / f"{split}.txt").write_text("".join(f"the cat {i % 7} sees a mouse .\n" for i in range(count)))
        elif task == "translation":
            pairs = [{"translation": {"fr": f"{i % 9} chats", "en": f"{i % 9} cats"}} for i in range(count)]
            (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
        elif split != "validation":
            kinds = {"image": datasets.Image(), "fine": datasets.ClassLabel(names=["dark", "light"])}
            images = [Image.fromarray(np.full((8, 8, 3), 5 * i, dtype=np.uint8)) for i in range(count)]
            columns = {"image": images, "fine": [int(i >= count / 2) for i in range(count)]}
            rows = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
            rows.to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("task", ["language_modeling", "translation", "image_classification"])
def test_the_configuration_that_init_writes_trains(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: ErrorOf
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "mine", task)
    code, said = printed("init", "mine")
    assert code == 0 and f"40 training rows: {task}." in said and "Wrote mine.yaml" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.yaml"]
    text = (tmp_path / "mine.yaml").read_text()
    fields = yaml.safe_load(text)
    # A comment on each field, and two lines about the file.
    assert sum(line.startswith("# ") for line in text.splitlines()) == len(fields) + 2
    expected = {"translation": {"source_lang": "en", "target_lang": "fr"}, "language_modeling": {"seq_len": 8}}
    expected["image_classification"] = {"image_column": "image", "label_column": "fine", "validation_samples": 4}
    assert expected[task].items() <= fields.items()
    assert "mine.yaml exists already" in error_of("init", "mine")
    words = ("--num_train_epochs", "1", "--save_model", "false", "--evaluate_untrained", "false")
    code, table = printed("train", "mine.yaml", *words, *(("--num_beams", "1") if task == "translation" else ()))
    assert code == 0 and f"{fields['extrap']} (" in table


def test_data_that_init_refuses(tmp_path: Path, error_of: ErrorOf) -> None:
    write_data(tmp_path / "text", "language_modeling")
    out = ("-o", tmp_path / "x.yaml")
    assert "has the columns text; allowed: `text`; `trans" in error_of(
        "init", tmp_path / "text", "--task", "translation", *out
    )
    (tmp_path / "text" / "test.txt").unlink()
    assert "has no split 'test'; allowed: train, validation, test." in error_of("init", tmp_path / "text", *out)
    (tmp_path / "empty").mkdir()
    assert "has no file for split 'train'" in error_of("init", tmp_path / "empty", *out)
    assert "neither a folder nor found on the Hub" in error_of("init", "nobody/nothing", *out)
    assert "(did you mean 'translation'?)" in error_of("init", "nobody/nothing", "--task", "translatio", *out)
    assert not (tmp_path / "x.yaml").exists()
