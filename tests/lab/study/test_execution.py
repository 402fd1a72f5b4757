"""Runs of a study that are trained: in one row, stopped by the clock and resumed, and in several processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hf_extrap.cli import main
from hf_extrap.lab.study import execution
from hf_extrap.lab.study.execution import OutOfTime, execute
from hf_extrap.lab.study.folder import StudyFolder
from hf_extrap.lab.study.plan import Plan
from hf_extrap.lab.study.specification import read_study


def wait_until(condition: Callable[[], Any], seconds: float = 240) -> None:
    until = time.time() + seconds
    while not condition():
        assert time.time() < until
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    """False also for a process that waits to be reaped, as its parent is gone."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def study_of(recipe: Path, folder: Path, **fields: Any) -> Path:
    """A study with one method, one trial and one seed: two runs."""
    content = {"name": "trained", "config": str(recipe), "fields": fields, "batches": [{"workers": 2}], "seeds": [1]}
    content |= {"methods": {"extrap-past": {"search": {"learning_rate": [0.5]}}}, "search": {"trials": 1}}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_run_stopped_by_the_clock(tiny_language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(study_of(tiny_language_model, tmp_path, save_steps=1))
    (cell,) = Plan(study).ready({})
    folders = [StudyFolder(tmp_path / name).run_folder(cell.fingerprint) for name in ("a", "b")]
    whole, history = execute(cell, folders[0], "test")
    assert (whole["status"], whole["steps"], whole["gradients"], whole["batch_size"]) == ("finished", 6, 6.0, 8.0)
    assert whole["first_loss"] == history[0]["loss"] > whole["validation"]["loss"]
    assert not list(folders[0].path.glob("*.safetensors"))

    # The clock passes the deadline at the fourth step, when three checkpoints are written.
    moments = iter([0.0, 0.0, 0.0, 9.0])
    with monkeypatch.context() as patched:
        clock = SimpleNamespace(time=lambda: next(moments), perf_counter=time.perf_counter)
        patched.setattr(execution, "time", clock)
        with pytest.raises(OutOfTime):
            execute(cell, folders[1], "test", deadline=5.0)
    resumed, _ = execute(cell, folders[1], "test")
    assert folders[1].read_metrics()["resumed_from"] == "checkpoint-3"
    assert resumed["test"] == whole["test"] and resumed["steps"] == 6

    # A run that was finished and not written down is read again, and nothing is trained.
    monkeypatch.setattr(execution, "run", lambda *_, **__: pytest.fail("trained again"))
    again, _ = execute(cell, folders[1], "test")
    assert again["status"] == "finished" and again["validation"] == resumed["validation"]


@pytest.mark.distributed
@pytest.mark.matrix
def test_two_processes_share_a_study_and_end_with_it(tiny_language_model: Path, tmp_path: Path) -> None:
    path = study_of(tiny_language_model, tmp_path, save_strategy="no", max_steps=3)
    content = yaml.safe_load(path.read_text())
    content["methods"]["none"] = {"search": {"learning_rate": [1e30]}, "fields": {"max_grad_norm": 0}}
    # The last batch size trains without end.
    content["batches"].append({"workers": 1, "fields": {"max_steps": 10**6}})
    path.write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    words = [sys.executable, "-m", "hf_extrap", "study", "run", str(path), "--output_dir", str(out), "--jobs", "2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        wait_until(lambda: len(StudyFolder(out).read()) >= 4)
        wait_until(lambda: list(out.glob("runs/*/history.jsonl")))
        children = [*map(int, Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split())]
        # The program cannot end its processes itself.
        program.kill()
        program.wait(10)
    assert len(children) >= 2
    wait_until(lambda: not any(map(is_alive, children)), seconds=10)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert sorted((row["method"], row["stage"], row["workers"], row["status"]) for row in rows) == [
        ("extrap-past", "final", 2, "finished"),
        ("extrap-past", "tune", 2, "finished"),
        ("none", "tune", 1, "diverged"),
        ("none", "tune", 2, "diverged"),
    ]
    assert all(row["threads"] == 1 for row in rows)
    # Another program may take over at once, and does within its time.
    assert main([*words[3:5], str(path), "--output_dir", str(out), "--minutes", "0.001"]) == 0
