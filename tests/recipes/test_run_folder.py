"""The folder of a run: atomic files, JSON values, and refusal of other runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import IntervalStrategy

from hf_extrap.recipes.run_folder import RunFolder, different_fields, read_json, write_json
from hf_extrap.training.versions import versions


def begin(folder: Path, **arguments: object) -> RunFolder:
    run = RunFolder(folder)
    run.write_configuration({"arguments": arguments})
    return run


def add_checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    if complete:
        (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def test_json_values_and_history(tmp_path: Path) -> None:
    values = {"a": float("nan"), "b": [float("inf"), 1.5], "c": torch.tensor(2), "d": IntervalStrategy.EPOCH, "e": True}
    write_json(tmp_path / "x.json", values)
    expected = {"a": None, "b": [None, 1.5], "c": 2, "d": "epoch", "e": True}
    assert json.loads((tmp_path / "x.json").read_text()) == expected
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": float("inf")}]
    folder = RunFolder(tmp_path / "run")
    folder.write_history(rows)
    assert folder.read_history() == [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": None}]
    assert RunFolder(tmp_path / "none").read_history() == []


def test_failed_writes_and_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "x.json", {"old": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(tmp_path / "x.json", {"new": 2})
    assert read_json(tmp_path / "x.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not valid JSON"):
        RunFolder(tmp_path).read_configuration()
    with pytest.raises(FileNotFoundError, match=r"metrics\.json does not exist"):
        RunFolder(tmp_path).read_metrics()


def test_last_checkpoint_different_fields_and_versions(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 9)
    add_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-11").write_text("")
    assert RunFolder(tmp_path).last_checkpoint() == tmp_path / "checkpoint-10"
    assert different_fields({"output_dir": "a", "seed": 1}, {"output_dir": "b", "seed": 1, "use_cpu": True}) == []
    assert different_fields({"seed": 1, "b": 1}, {"seed": 2, "a": 1}) == ["a", "b", "seed"]
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "transformers", "accelerate", "datasets", "hf_extrap"} <= set(found)


def test_which_folders_are_accepted(tmp_path: Path) -> None:
    RunFolder(tmp_path).check({"seed": 1}, resume=False)
    RunFolder(tmp_path / "new").check({"seed": 1}, resume=False)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not the folder of a run"):
        RunFolder(tmp_path).check({"seed": 1}, resume=False)
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").check({"seed": 1}, resume=False)
    folder = begin(tmp_path / "run", seed=1)
    # It failed before it logged anything: the corrected run may replace it.
    folder.check({"seed": 2}, resume=False)
    folder.write_history([{"step": 1, "loss": 2.5}])
    folder.check({"seed": 1}, resume=False)
    with pytest.raises(ValueError, match="another run: its seed is 1, not 2"):
        folder.check({"seed": 2}, resume=True)
    add_checkpoint(folder.path, 5)
    with pytest.raises(ValueError, match="up to checkpoint-5; resume with --resume_from_checkpoint true"):
        folder.check({"seed": 1}, resume=False)
    folder.check({"seed": 1, "resume_from_checkpoint": "true"}, resume=True)
    folder.write_metrics({"status": "finished"})
    with pytest.raises(ValueError, match="holds this run, finished"):
        folder.check({"seed": 1}, resume=False)
    # A finished run is left as it is when it is resumed.
    folder.check({"seed": 1}, resume=True)


def test_a_folder_is_locked_while_its_launch_lives(tmp_path: Path) -> None:
    """The lock of a process that has ended, in whatever way, does not count."""
    hold = "import sys, time; from pathlib import Path; from hf_extrap.recipes.run_folder import RunFolder\n"
    hold += f"with RunFolder(Path({str(tmp_path)!r})).locked(0): print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    # Only the first process of a launch holds it.
    with RunFolder(tmp_path).locked(1):
        pass
    with pytest.raises(ValueError, match="is in use by another launch"), RunFolder(tmp_path).locked(0):
        pass
    other.kill()
    other.wait()
    with RunFolder(tmp_path).locked(0):
        RunFolder(tmp_path).check({"seed": 1}, resume=False)
    with RunFolder(tmp_path).locked(0):
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"output_dir \S+/file/run cannot be written \(Not a directory\)"),
        RunFolder(tmp_path / "file" / "run").locked(0),
    ):
        pass
