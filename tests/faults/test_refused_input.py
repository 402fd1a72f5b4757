"""Input that cannot be used, through the program: one sentence that names it, and exit code 2."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from hf_extrap import ExtrapConfig
from hf_extrap.cli import main
from hf_extrap.optim.yaml_text import read_yaml
from hf_extrap.recipes.run_folder import RunFolder

ErrorOf = Callable[..., str]

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
#: The same by merges of mappings.
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{','.join([f'*{chr(97 + i)}'] * 9)}]}}\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "is not valid YAML at line 1: it has more than 50 levels."),
        ("{a: " * 100_000, "it has more than 50 levels."),
        ("- " * 100_000, "it has more than 50 levels."),
        (BOMB, "it has more than 20,000 values, those of its aliases included."),
        (MERGES, "it has more than 20,000 values, those of its aliases included."),
        ("a: &a [*a]", "is not valid YAML at line 1: an alias stands inside the value that it names."),
        ("a: 1\n" * 500_000, "has 2,500,000 characters; allowed: 1,000,000."),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: 2024-13-45", "is not valid YAML: month must be in 1..12."),
        ("a: !!timestamp x", "is not valid YAML: "),
        ("a: \x00", "is not valid YAML: special characters are not allowed."),
        ("a: [1", "is not valid YAML at line 1"),
    ],
)
def test_yaml(text: str, reason: str, tmp_path: Path, error_of: ErrorOf) -> None:
    (tmp_path / "file.yaml").write_text(text)
    signal.alarm(20)
    try:
        for words in (("train",), ("study", "report")):
            error = error_of(*words, tmp_path / "file.yaml")
            assert str(tmp_path / "file.yaml") in error and reason in error
        with pytest.raises(ValueError, match="the extrap configuration") as refused:
            ExtrapConfig.from_yaml(text)
        assert reason in str(refused.value)
    finally:
        signal.alarm(0)


def test_aliases_within_the_limits_are_read() -> None:
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]", "it") == {
        **{"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}
    }
    assert ExtrapConfig.from_yaml(ExtrapConfig.preset("sam").to_yaml()) == ExtrapConfig.preset("sam")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--learning_rate nan", "learning_rate is nan; allowed: a finite number."),
        (f"--learning_rate 1{'0' * 310}", "learning_rate is inf; allowed: a finite number."),
        (f"--max_steps 1{'0' * 310}", "max_steps is a whole number of 1030 bits; allowed: one of at most 63 bits."),
        ("--weight_decay inf", "weight_decay is inf; allowed: a finite number."),
        ("--lr_milestones 0.1 nan", "lr_milestones is nan; allowed: a finite number."),
        ("--dropout nan", "dropout is nan; allowed: a finite number."),
        ("--abort_factor inf", "abort_factor is inf; allowed: a finite number."),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size is 0; allowed: a number >= 1."),
        ("--per_device_eval_batch_size 0", "per_device_eval_batch_size is 0; allowed: a number >= 1."),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps is 0; allowed: a number >= 1."),
        ("--eval_accumulation_steps 0", "eval_accumulation_steps is 0; allowed: a number >= 1."),
        ("--seed -1", "seed is -1; allowed: a number >= 0."),
        ("--seed 4294967296", "seed is 4294967296; allowed: a whole number below 2 ** 32."),
        ("--optim_args x", "optim_args is 'x'; allowed: name=value, separated by commas."),
        ("--lr_scheduler_kwargs [", "lr_scheduler_kwargs is '['; allowed: a mapping."),
        ("--hidden_size 100000000000", "there is not enough memory: "),
        ("--per_device_train_batch_size 99999", "decrease the batch size or `seq_len`, or give more text."),
    ],
)
def test_fields(words: str, sentence: str, tiny_language_model: Path, tmp_path: Path, error_of: ErrorOf) -> None:
    assert sentence in error_of("train", tiny_language_model, "--output_dir", tmp_path / "run", *words.split())


def test_fewer_items_than_a_global_batch(tmp_path: Path, error_of: ErrorOf) -> None:
    words = "--task image_classification --depth 8 --width 2 --max_train_samples 31 --per_device_train_batch_size 16"
    error = error_of("train", *words.split(), "--extrap_virtual_workers", 2, "--output_dir", tmp_path / "run")
    assert "the training data have 31 items and one step takes 32 (16 per batch x 2 accumulated batches x 1" in error


def write_splits(folder: Path, name: str, content: str | dict[str, list[Any]]) -> Path:
    folder.mkdir()
    for split in ("train", "validation", "test"):
        if isinstance(content, str):
            (folder / f"{split}.{name}").write_text(content)
        else:
            pyarrow.parquet.write_table(pyarrow.table(content), folder / f"{split}.{name}")
    return folder


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("jsonl", "1\n2\n3\n", "train.jsonl' cannot be read as json: ArrowInvalid: JSON parse error"),
        ("jsonl", '{"text": 5}\n', "row 0 of split 'train' has no text in 'text': 5."),
        ("jsonl", '{"text": "a"}\n{"text": null}\n', "row 1 of split 'train' has no text in 'text': None."),
        ("jsonl", '{"text": ' + "[" * 3000 + "]" * 3000 + "}\n", "train.jsonl' cannot be read as json"),
        ("parquet", {"text": [b"a b", b"\xff"]}, "row 0 of split 'train' has no text in 'text': b'a b'."),
    ],
)
def test_data(
    name: str, content: Any, sentence: str, tiny_language_model: Path, tmp_path: Path, error_of: ErrorOf
) -> None:
    data = write_splits(tmp_path / "data", name, content)
    words = ("--output_dir", tmp_path / "run", "--data_cache_dir", tmp_path / "cache")
    assert sentence in error_of("train", tiny_language_model, "--data_dir", data, *words)


def test_rows_that_name_files_instead_of_holding_images(tmp_path: Path, error_of: ErrorOf) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    images = pyarrow.array([{"bytes": None, "path": str(tmp_path / "secret.png")}] * 4, kind)
    features = {"img": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    table = pyarrow.table({"img": images, "label": [0, 1, 0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation", "test"):
        pyarrow.parquet.write_table(table, data / f"{split}.parquet")
    words = ("--task", "image_classification", "--data_dir", data, "--data_cache_dir", tmp_path / "cache")
    error = error_of("train", *words, "--output_dir", tmp_path / "run")
    assert "train.parquet' has a row without an image in 'img'; allowed: encoded images." in error


def test_a_model_whose_shards_are_elsewhere(tiny_language_model: Path, tmp_path: Path, error_of: ErrorOf) -> None:
    words = ("train", tiny_language_model, "--max_steps", 1, "--evaluate_untrained", "false")
    assert main([str(word) for word in (*words, "--output_dir", tmp_path / "run")]) == 0
    (tmp_path / "run/model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(["lm_head.bias"], "../outside.safetensors")}
    (tmp_path / "run/model.safetensors.index.json").write_text(json.dumps(index))
    error = error_of(*words, "--model", tmp_path / "run", "--output_dir", tmp_path / "other")
    assert "index.json is not an index of weights: it names '../outside.safetensors'" in error


def test_a_run_that_fails_at_its_start_does_not_block_the_corrected_one(
    tiny_language_model: Path, tmp_path: Path, error_of: ErrorOf
) -> None:
    words = ("train", tiny_language_model, "--output_dir", tmp_path / "run", "--max_steps", 2)
    assert "need" in error_of(*words, "--per_device_train_batch_size", 9999)
    assert (tmp_path / "run/run.json").is_file()
    assert main([str(word) for word in words]) == 0
    recorded = RunFolder(tmp_path / "run").read_configuration()["arguments"]
    assert recorded["per_device_train_batch_size"] == 4
    # A damaged run.json of a run that has begun is refused.
    (tmp_path / "run/metrics.json").unlink()
    (tmp_path / "run/run.json").write_text("{}")
    assert "run.json has no mapping `arguments`; allowed: a run's own file." in error_of(*words)


@pytest.mark.parametrize("place", ["/sys/run", "/proc/run", "file/run", "file", "link", "x" * 300])
def test_output_folders_that_cannot_be(
    place: str, tiny_language_model: Path, tmp_path: Path, error_of: ErrorOf
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    error = error_of("train", tiny_language_model, "--output_dir", tmp_path / place)
    assert place in error


@pytest.mark.parametrize("size", [100, 2000, 10_000])
def test_files_that_cannot_be_written_whole(
    size: int, tiny_language_model: Path, tmp_path: Path, error_of: ErrorOf
) -> None:
    folder, words = tmp_path / "run", ("train", tiny_language_model, "--output_dir")
    # Fills the caches.
    assert main([*map(str, words), str(tmp_path / "first"), "--max_steps", "1", "--save_model", "false"]) == 0
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, whole[1]))
    try:
        error = error_of(*words, folder, "--save_model", "false")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert str(folder) in error and ("File too large" in error or "cannot be written, as on a full disk" in error)


def test_every_process_prints_its_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, start in (("0", "hf-extrap: error: "), ("1", "hf-extrap: process 1: error: ")):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "--task", "poetry"]) == 2
        assert capsys.readouterr().err.startswith(f"{start}task 'poetry' is unknown")


@pytest.mark.parametrize(
    "name", ["../../x", "a/b", "x](javascript:alert(1))", "<script>", "{{ 7 }}", "$x$", "", "a\nb"]
)
def test_names_in_a_study(name: str, tmp_path: Path, error_of: ErrorOf) -> None:
    study = {"config": None, "batches": [{"workers": 1}], "search": {}, "seeds": [1]}
    method = {"search": {"learning_rate": [1]}, "fields": {"extrap": "none"}}
    for place, content in (
        ("name", {"name": name, "methods": {"none": method}}),
        ("methods", {"name": "x", "methods": {name: method}}),
    ):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | content))
        error = error_of("study", "report", tmp_path / "study.yaml")
        assert f"study.yaml: {place}" in error and "is no name; allowed: at most 100 characters" in error
