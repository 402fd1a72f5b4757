"""The command line: errors of the user end in one sentence and exit code 2; help imports nothing heavy."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from hf_extrap.cli import check_launch, main
from hf_extrap.recipes.configuration import check_processes, resolve, to_words

WriteConfig = Callable[[str, dict[str, Any]], Path]


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that these words end in."""
    assert main(words) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("hf-extrap: error: ") and lines[0].endswith(".")
    return lines[0].removeprefix("hf-extrap: error: ")


HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "matplotlib", "sklearn", "yaml", "rich")


def heavy_modules_of(code: str) -> set[str]:
    """The heavy modules that a new process has imported when it has run the code."""
    show = f"{code}\nimport sys\nprint('heavy:', *({set(HEAVY)!r} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout
    return set(out.rpartition("heavy:")[2].split())


@pytest.mark.parametrize(
    "code",
    ["import hf_extrap", "import hf_extrap; hf_extrap.ExtrapConfig.preset('extrap')", "import hf_extrap.cli"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    assert heavy_modules_of(code) == set()


@pytest.mark.parametrize("command", ["", "compare", "sharpness", "study", "study run", "study report", "doctor"])
def test_help_imports_nothing_heavy(command: str) -> None:
    words = [*command.split(), "--help"]
    code = f"from hf_extrap.cli import main\ntry: main({words!r})\nexcept SystemExit as end: assert end.code == 0"
    assert heavy_modules_of(code) == set()


def test_figures_are_the_last_thing_that_a_run_imports() -> None:
    imported = heavy_modules_of("import hf_extrap.recipes.run")
    assert {"torch", "transformers"} <= imported and "matplotlib" not in imported


def test_imports_are_spared_the_collector_which_runs_afterwards() -> None:
    code = (
        "import gc\nfrom hf_extrap.cli.imports import importing\n"
        "collections = sum(row['collections'] for row in gc.get_stats())\n"
        "with importing():\n    import torch\n    assert not gc.isenabled()\n"
        "assert sum(row['collections'] for row in gc.get_stats()) == collections\n"
        "kept = gc.get_freeze_count()\nassert gc.isenabled() and kept > 100_000, kept\n"
        # What a program holds after its imports is its own business.
        "with importing():\n    assert gc.isenabled()\nassert gc.get_freeze_count() <= kept"
    )
    assert heavy_modules_of(code) >= {"torch"}


def test_python_dash_m_is_the_same_program(launch: Callable[..., str]) -> None:
    assert "usage: hf-extrap" in launch("-m", "hf_extrap", "--help")


def test_train_help_lists_the_fields_of_task_trainer_and_extrapolation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--task", "translation", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("vocab_size", "extrap_step_ratio", "learning_rate", "max_steps"))


def test_doctor_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "one process" in capsys.readouterr().out
    assert "doctor takes no '--fast'" in error_of(["doctor", "--fast"], capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--extrapp sam", "unknown field --extrapp (did you mean 'extrap'?)"),
        ("--xyzzyq 1", "unknown field --xyzzyq (`hf-extrap train --help` lists all)"),
        ("--extrap extrapolate", "extrap preset is 'extrapolate'; allowed: none, extrap, extrap-past"),
        ("--extrap extrap --extrap_step_size 1 --extrap_step_ratio 1", "both given; allowed: exactly one"),
        ("--extrap extrap --extrap_step_size large", "extrap_step_size is 'large'; allowed: a number, or 'auto'"),
        ("--extrap extrap --extrap_batch_fraction 1.5", "batch_fraction is 1.5; allowed: a number in (0, 1]"),
        ("--extrap extrap --extrap_batch_fraction 0", "batch_fraction is 0.0; allowed: a number in (0, 1]"),
        ("--extrap_scope galactic", "--extrap_scope: invalid choice: 'galactic'"),
        ("--learning_rate fast", "--learning_rate: invalid float value: 'fast'"),
        ("--max_steps", "--max_steps: expected one argument"),
        ("--max_steps 5 6", "unexpected word '6'"),
        ("--task poetry", "task 'poetry' is unknown: choose one of image_classification, language_modeling"),
        ("--data_dir /nowhere", "/nowhere"),
        ("--resume_from_checkpoint /nowhere", "checkpoint /nowhere does not exist"),
        ("--resume_from_checkpoint true", "holds no checkpoint to resume from"),
    ],
)
def test_a_bad_word_ends_in_one_sentence(
    words: str, sentence: str, tiny_translation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", str(tiny_translation), "--output_dir", str(tmp_path / "run")]
    assert sentence in error_of([*base, *words.split()], capsys)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rate: [1, 2", "is not valid YAML at line"),
        ("- a\n- b\n", "is not a mapping of field names to values"),
        ("learning_rat: 1\n", "unknown field 'learning_rat' (did you mean 'learning_rate'?)"),
        ("learning_rate: fast\n", "--learning_rate: invalid float value: 'fast'"),
        ("bf16: perhaps\n", "--bf16"),
        ("\xff\xfe\x00", "is not text in UTF-8"),
    ],
)
def test_a_bad_file_ends_in_one_sentence(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    assert "does not exist" in error_of(["train", str(path)], capsys)
    path.write_bytes(text.encode("latin-1"))
    assert sentence in error_of(["train", str(path), "--task", "translation"], capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--presets none,bogus", "--presets: 'bogus' is no preset; allowed: none, extrap"),
        ("--presets extrap:step_ratio", "'step_ratio' in 'extrap:step_ratio' is not field=value"),
        ("--presets none --seeds 0,x", "--seeds is '0,x'; allowed: int values separated by commas"),
        ("--seeds 1,1", "--seeds is '1,1'; allowed: one or more different values"),
        ("--seed 3", "--seed: a comparison sets it for each run; use --seeds"),
        ("--extrap=sam", "--extrap: a comparison sets it for each run; use --presets"),
        ("--learning_rates ,", "--learning_rates is ','"),
        ("--presets extrap:step_ratio=-1", "step_ratio is -1.0; allowed: a number >= 0"),
    ],
)
def test_a_bad_comparison_ends_in_one_sentence(
    words: str, sentence: str, tiny_translation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["compare", str(tiny_translation), "--output_dir", str(tmp_path / "grid")]
    assert sentence in error_of([*base, *words.split()], capsys)
    assert not (tmp_path / "grid").exists()


def test_the_command_line_wins_over_the_file_and_the_file_over_the_task(write_config: WriteConfig) -> None:
    path = write_config(
        "mine", {"task": "translation", "learning_rate": 1e-3, "label_smoothing_factor": 0.2, "seed": 7}
    )
    found = resolve(path, ["--learning_rate", "5e-5", "--extrap=extrap-past"]).training_arguments
    assert (found.learning_rate, found.label_smoothing_factor, found.seed) == (5e-5, 0.2, 7)
    assert found.predict_with_generate is True
    assert found.output_dir == "runs/mine-extrap-past-7"


def test_yaml_values_keep_their_types(write_config: WriteConfig) -> None:
    fields = {"task": "translation", "learning_rate": "5e-5", "bf16": False, "lr_milestones": [0.5, 0.75]}
    fields |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "label_smoothing_factor": None}
    fields |= {"extrap": "extrap", "extrap_ascent": True, "extrap_step_size": 0.5}
    resolved = resolve(write_config("typed", fields))
    found = resolved.training_arguments
    assert found.learning_rate == 5e-5
    assert found.lr_milestones == [0.5, 0.75]
    assert found.lr_scheduler_kwargs == {"num_cycles": 2}
    assert found.label_smoothing_factor == 0.0
    scheme = found.extrap_config()
    assert (scheme.ascent, scheme.step_size, scheme.step_ratio) == (True, 0.5, None)
    assert "label_smoothing_factor" not in resolved.given
    assert resolved.given["lr_milestones"] == [0.5, 0.75]


def test_a_developer_can_have_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_EXTRAP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="task 'poetry' is unknown"):
        main(["train", "--task", "poetry"])


def test_no_is_a_word_if_the_field_is_a_string(tmp_path: Path) -> None:
    (tmp_path / "no.yaml").write_text("task: translation\nsave_strategy: no\nbf16: no\ndisable_tqdm: true\n")
    found = resolve(tmp_path / "no.yaml").training_arguments
    assert (found.save_strategy, found.bf16, found.disable_tqdm) == ("no", False, True)


def test_what_tunes_the_files_preset_does_not_tune_another(write_config: WriteConfig) -> None:
    fields = {"task": "translation", "extrap": "extrap", "extrap_step_ratio": 0.5, "extrap_virtual_workers": 2}
    path = write_config("tuned", fields)
    assert resolve(path).training_arguments.extrap_config().step_ratio == 0.5
    other = resolve(path, ["--extrap", "none"]).training_arguments
    assert other.extrap_config().step_ratio is None
    assert other.extrap_virtual_workers == 2


def test_words_say_the_same_as_the_mapping() -> None:
    words = ["--a=1e-05", "--b", "1", "2", '--c={"d": null}', "--e=True"]
    assert to_words({"a": 1e-5, "b": [1, 2], "c": {"d": None}, "e": True}) == words


def test_processes_that_do_not_see_each_other_are_refused(
    tiny_translation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = resolve(tiny_translation).training_arguments
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes were launched, but the process group has 1"):
        check_processes(arguments)


def test_errors_of_files_are_one_sentence(
    tmp_path: Path, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    below = ["train", str(tiny_language_model), "--output_dir", str(tmp_path / "file" / "run")]
    assert "file" in error_of(below, capsys) and "irectory" in error_of(below, capsys)
    # As torch.save raises on a full disk.
    full_disk = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    for error, sentence in (
        (OSError(errno.ENOSPC, "No space left on device", "run/model"), "run/model: No space left on device."),
        (PermissionError(errno.EACCES, "Permission denied", "run"), "run: Permission denied."),
        (OSError("gpt3 is not\n  a model"), "gpt3 is not a model."),
        (yaml.YAMLError("a tab in line 3"), "a tab in line 3."),
        (full_disk, f"torch.save cannot write a file, as on a full disk: {full_disk}."),
    ):
        monkeypatch.setattr(check_launch, "run", Mock(side_effect=error))
        assert error_of(["doctor"], capsys) == sentence
    monkeypatch.setattr(check_launch, "run", Mock(side_effect=KeyError("a defect of the program")))
    with pytest.raises(KeyError):
        main(["doctor"])
