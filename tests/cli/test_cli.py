"""The command line: errors of the user end in one sentence and exit code 2; help imports nothing heavy."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from hf_extrap.cli import main
from hf_extrap.cli.doctor import machine
from hf_extrap.recipes.configuration import check_processes, resolve, to_words

ErrorOf = Callable[..., str]
WriteConfig = Callable[[str, dict[str, Any]], Path]


HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "matplotlib", "sklearn", "yaml", "rich")


def heavy_modules_of(code: str) -> set[str]:
    """The heavy modules that a new process has imported when it has run the code."""
    show = f"{code}\nimport sys\nprint('heavy:', *({set(HEAVY)!r} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout
    return set(out.rpartition("heavy:")[2].split())


PRESET = "import hf_extrap; hf_extrap.ExtrapConfig.preset('extrap')"


@pytest.mark.parametrize(
    "command", ["", "init", "compare", "sharpness", "bench", "study", "study run", "study report", "doctor", None]
)
def test_configurations_and_help_import_nothing_heavy(command: str | None) -> None:
    words = [*(command or "").split(), "--help"]
    code = f"from hf_extrap.cli import main\nassert main({words!r}) == 0"
    assert heavy_modules_of(PRESET if command is None else code) == set()


def test_imports_without_garbage_collection_and_without_figures() -> None:
    code = (
        "import gc\nfrom hf_extrap.cli.imports import importing\n"
        "collections = sum(row['collections'] for row in gc.get_stats())\n"
        "with importing():\n    import torch\n    assert not gc.isenabled()\n"
        "assert sum(row['collections'] for row in gc.get_stats()) == collections\n"
        "kept = gc.get_freeze_count()\nassert gc.isenabled() and kept > 100_000, kept\n"
        "with importing():\n    assert gc.isenabled()\nassert gc.get_freeze_count() <= kept"
    )
    assert heavy_modules_of(code) >= {"torch"}
    imported = heavy_modules_of("import hf_extrap.recipes.run")
    assert {"torch", "transformers"} <= imported and "matplotlib" not in imported


COMMANDS = ("init", "train", "compare", "study run", "study report", "sharpness", "bench", "doctor")


@pytest.mark.parametrize("command", ["", "study", *COMMANDS])
def test_help_fits_a_screen_and_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 120
    if command == "train":
        # The fields of the task and of the extrapolation, one line each.
        names = ("--task ", "--seq_len ", "--extrap_step_ratio ", "--lr_scaling ", "--learning_rate ", "--help_all ")
        assert all(sum(line.startswith(f"  {name}") for line in lines) == 1 for name in names) and len(lines) < 115
        assert "--num_beams" not in shown and "--fp16 " not in shown
    else:
        assert 8 <= len(lines) <= 40
    if command in COMMANDS:
        (start,) = [index for index, line in enumerate(lines) if line.strip() in ("Example:", "Examples:")]
        assert lines[start + 1].strip().startswith(f"hf-extrap {command} ")


def test_train_help_is_of_the_task_and_has_every_field_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--task", "translation", "--help"]) == 0
    assert "--num_beams " in capsys.readouterr().out
    assert main(["train", "--task", "translation", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("vocab_size", "extrap_step_ratio", "fp16", "max_steps"))


def test_the_shell_completes_commands_and_options() -> None:
    for typed, completed in (("hf-extrap s", {"study", "sharpness"}), ("hf-extrap bench --ro", {"--rounds"})):
        environment = {"_HF_EXTRAP_COMPLETE": "complete_bash", "COMP_WORDS": typed}
        environment["COMP_CWORD"] = str(len(typed.split()) - 1)
        done = subprocess.run(
            [sys.executable, "-m", "hf_extrap"], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert set(done.stdout.split()) == completed, done.stderr
    environment = {**os.environ, "_HF_EXTRAP_COMPLETE": "source_bash"}
    script = subprocess.run([sys.executable, "-m", "hf_extrap"], env=environment, capture_output=True, text=True).stdout
    assert "complete -o default -F" in script and "hf-extrap" in script


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "no command is given; `hf-extrap --help` lists them."),
        ("trian", "no such command 'trian' (did you mean 'train'?)."),
        ("study rn x", "no such command 'rn' (did you mean 'run'?)."),
        ("bench --round 3", "no such option: --round (did you mean --rounds?)."),
        ("bench --rounds x", "invalid value for '--rounds'"),
        ("bench three", "got unexpected extra argument(s) (three)."),
        ("train --dryrun", "unknown option --dryrun (did you mean --dry_run?)."),
        ("compare --pressets none", "unknown option --pressets (did you mean --presets?)."),
        ("train --learning_rat 1", "unknown field --learning_rat (did you mean 'learning_rate'?)."),
        ("train --task translatoin", "(did you mean 'translation'?)."),
        ("train --extrap past-updat", "(did you mean 'past-update'?)."),
        ("train --extrap_scope locl", "(did you mean 'local'?)."),
        ("train --optim adamw_torhc", "--optim: invalid choice: 'adamw_torhc' (did you mean 'adamw_torch'?)."),
        ("train --base_optimizer adamww", "(did you mean 'adamw'?)."),
        ("sharpness", "sharpness needs the folder of a run"),
    ],
)
def test_mistyped_words_suggest_the_nearest(words: str, sentence: str, error_of: ErrorOf) -> None:
    error = error_of(*words.split())
    assert sentence in error and len(error) < 250


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("train", "--extrapp sam", "unknown field --extrapp (did you mean 'extrap'?)"),
        ("train", "--xyzzyq 1", "unknown field --xyzzyq (`hf-extrap train --help_all` lists all)"),
        ("train", "--extrap extrapolate", "extrap preset is 'extrapolate'; allowed: none, extrap, extrap-past"),
        ("train", "--extrap_scope galactic", "--extrap_scope: invalid choice: 'galactic'"),
        ("train", "--learning_rate fast", "--learning_rate: invalid float value: 'fast'"),
        ("train", "--max_steps", "--max_steps: expected one argument"),
        ("train", "--max_steps 5 6", "unexpected word '6'"),
        ("train", "--task poetry", "task 'poetry' is unknown: choose one of image_classification, language_modeling"),
        ("train", "--data_dir /nowhere", "/nowhere"),
        ("train", "--resume_from_checkpoint /nowhere", "checkpoint /nowhere does not exist"),
        ("train", "--resume_from_checkpoint true", "holds no checkpoint to resume from"),
        ("compare", "--presets none,bogus", "--presets: 'bogus' is no preset; allowed: none, extrap"),
        ("compare", "--presets extrap:step_ratio", "'step_ratio' in 'extrap:step_ratio' is not field=value"),
        ("compare", "--presets none --seeds 0,x", "--seeds is '0,x'; allowed: int values separated by commas"),
        ("compare", "--seeds 1,1", "--seeds is '1,1'; allowed: one or more different values"),
        ("compare", "--seed 3", "--seed: a comparison sets it for each run; use --seeds"),
        ("compare", "--extrap=sam", "--extrap: a comparison sets it for each run; use --presets"),
        ("compare", "--learning_rates ,", "--learning_rates is ','"),
        ("compare", "--presets extrap:step_ratio=-1", "step_ratio is -1.0; allowed: a number >= 0"),
    ],
)
def test_bad_words(
    command: str, words: str, sentence: str, tiny_translation: Path, tmp_path: Path, error_of: ErrorOf
) -> None:
    assert sentence in error_of(command, tiny_translation, "--output_dir", tmp_path / "run", *words.split())
    assert command == "train" or not (tmp_path / "run").exists()


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
def test_a_bad_file(text: str, sentence: str, tmp_path: Path, error_of: ErrorOf) -> None:
    path = tmp_path / "bad.yaml"
    assert "does not exist" in error_of("train", path)
    path.write_bytes(text.encode("latin-1"))
    assert sentence in error_of("train", path, "--task", "translation")


def test_precedence_of_command_line_file_and_task(write_config: WriteConfig) -> None:
    fields = {"task": "translation", "learning_rate": 1e-3, "label_smoothing_factor": 0.2, "seed": 7}
    path = write_config("mine", fields)
    found = resolve(path, ["--learning_rate", "5e-5", "--extrap=extrap-past"]).training_arguments
    assert (found.learning_rate, found.label_smoothing_factor, found.seed) == (5e-5, 0.2, 7)
    assert found.predict_with_generate is True
    assert found.output_dir == "runs/mine-extrap-past-7"
    fields = {"task": "translation", "extrap": "extrap", "extrap_step_ratio": 0.5, "extrap_virtual_workers": 2}
    path = write_config("tuned", fields)
    assert resolve(path).training_arguments.extrap_config().step_ratio == 0.5
    other = resolve(path, ["--extrap", "none"]).training_arguments
    assert other.extrap_config().step_ratio is None
    assert other.extrap_virtual_workers == 2


def test_yaml_values_keep_their_types(write_config: WriteConfig, tmp_path: Path) -> None:
    fields = {"task": "translation", "learning_rate": "5e-5", "bf16": False, "lr_milestones": [0.5, 0.75]}
    fields |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "label_smoothing_factor": None}
    fields |= {"extrap": "extrap", "extrap_ascent": True, "extrap_step_size": 0.5}
    resolved = resolve(write_config("typed", fields))
    found, scheme = resolved.training_arguments, resolved.training_arguments.extrap_config()
    assert (found.learning_rate, found.lr_milestones, found.label_smoothing_factor) == (5e-5, [0.5, 0.75], 0.0)
    assert found.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (scheme.ascent, scheme.step_size, scheme.step_ratio) == (True, 0.5, None)
    assert "label_smoothing_factor" not in resolved.given and resolved.given["lr_milestones"] == [0.5, 0.75]
    # Unquoted, `no` is false in YAML; a field that is a string takes the word.
    (tmp_path / "no.yaml").write_text("task: translation\nsave_strategy: no\nbf16: no\ndisable_tqdm: true\n")
    found = resolve(tmp_path / "no.yaml").training_arguments
    assert (found.save_strategy, found.bf16, found.disable_tqdm) == ("no", False, True)
    words = ["--a=1e-05", "--b", "1", "2", '--c={"d": null}', "--e=True"]
    assert to_words({"a": 1e-5, "b": [1, 2], "c": {"d": None}, "e": True}) == words


def test_errors_of_files_and_processes_are_one_sentence(
    tmp_path: Path, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch, error_of: ErrorOf
) -> None:
    (tmp_path / "file").write_text("")
    error = error_of("train", tiny_language_model, "--output_dir", tmp_path / "file" / "run")
    assert "file" in error and "irectory" in error
    # As torch.save raises on a full disk.
    full_disk = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    for error, sentence in (
        (OSError(errno.ENOSPC, "No space left on device", "run/model"), "run/model: No space left on device."),
        (PermissionError(errno.EACCES, "Permission denied", "run"), "run: Permission denied."),
        (OSError("gpt3 is not\n  a model"), "gpt3 is not a model."),
        (yaml.YAMLError("a tab in line 3"), "a tab in line 3."),
        (full_disk, f"a file cannot be written, as on a full disk: {full_disk}."),
    ):
        monkeypatch.setattr(machine, "this_machine", Mock(side_effect=error))
        assert error_of("doctor") == sentence
    monkeypatch.setattr(machine, "this_machine", Mock(side_effect=KeyError("a defect of the program")))
    with pytest.raises(KeyError):
        main(["doctor"])
    arguments = resolve(tiny_language_model).training_arguments
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes were launched, but the process group has 1"):
        check_processes(arguments)
    monkeypatch.setenv("HF_EXTRAP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="task 'poetry' is unknown"):
        main(["train", "--task", "poetry"])
