"""Settings and fixtures for every test: offline, one thread, caches in a temporary folder."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
_CACHE = tempfile.mkdtemp(prefix="hf_extrap_tests_")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
# Before anything imports transformers or datasets, which read these once.
os.environ.update(
    HF_HOME=_CACHE,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    # For the programs that tests start.
    PYTHONPATH=os.pathsep.join(
        filter(None, [str(REPOSITORY / "tests" / "startup"), str(REPOSITORY), os.environ.get("PYTHONPATH")])
    ),
)


def pytest_collection_finish() -> None:
    """Exempt what is imported from later collections: a Trainer collects after training, for most of a test's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with WikiText-2, Multi30k and CIFAR-10 beside the checkout; skips where it is missing."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the corpora in ../shared/data, which are not here")
    return folder


TINY_TRANSLATION: dict[str, Any] = {
    "task": "translation",
    "vocab_size": 400,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "attention_heads": 2,
    "ffn_dim": 32,
    "max_length": 32,
    "batch_tokens": 256,
    "max_train_samples": 100,
    "max_eval_samples": 8,
    "num_beams": 2,
    "max_steps": 6,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "disable_tqdm": True,
}


TINY_LANGUAGE_MODEL: dict[str, Any] = {
    "task": "language_modeling",
    "seq_len": 8,
    "vocab_size": 200,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "dropout": 0.1,
    "max_train_samples": 100,
    "max_eval_samples": 8,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 6,
    "optim": "sgd",
    "learning_rate": 1.0,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "disable_tqdm": True,
}


TINY_IMAGES: dict[str, Any] = {
    "task": "image_classification",
    "depth": 8,
    "width": 4,
    "max_train_samples": 64,
    "max_eval_samples": 16,
    "per_device_train_batch_size": 16,
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture(scope="session")
def task_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of every task, named like it, which tests only read."""
    from hf_extrap.cli import main

    folder = tmp_path_factory.mktemp("task_runs")
    for fields in (TINY_IMAGES, TINY_LANGUAGE_MODEL, {**TINY_TRANSLATION, "eval_strategy": "no"}):
        configuration = folder / f"{fields['task']}.yaml"
        configuration.write_text(yaml.safe_dump(fields), encoding="utf-8")
        assert main(["train", str(configuration), "--output_dir", str(folder / str(fields["task"]))]) == 0
    return folder


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes a YAML configuration: `write_config(name, fields)`."""

    def write(name: str, fields: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_translation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains a toy translation model in a second."""
    path = tmp_path_factory.mktemp("configurations") / "tiny_translation.yaml"
    path.write_text(yaml.safe_dump(TINY_TRANSLATION), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains a toy LSTM language model in a second."""
    path = tmp_path_factory.mktemp("configurations") / "tiny_language_model.yaml"
    path.write_text(yaml.safe_dump(TINY_LANGUAGE_MODEL), encoding="utf-8")
    return path


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., str]:
    """Runs `python WORDS` in two or more processes that can form a group: `launch(*words)`; gives all that they print.

    The first process comes last.
    """

    def run(*words: str | Path, processes: int = 2, expect: int = 0) -> str:
        from tests.support.in_processes import program, start

        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        codes = start(program, folder, processes, *map(str, words))
        printed = "".join((folder / f"rank_{rank}.log").read_text() for rank in reversed(range(processes)))
        assert codes == [expect] * processes, f"exit codes {codes}\n{printed[-8000:]}"
        return printed

    return run


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `hf-extrap` with words that it refuses: `error_of("train", path)`; gives the one sentence of the error."""

    def run(*words: object) -> str:
        from hf_extrap.cli import main

        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-extrap: error: ")]
        assert line.endswith(".")
        return line.removeprefix("hf-extrap: error: ")

    return run


@pytest.fixture(scope="session")
def run_processes() -> Callable[..., list[Any]]:
    """What `in_processes(folder, *words)` of a module returns in each process: `run_processes(module, folder, …)`."""

    def run(module: str, folder: Path, *words: str | Path, processes: int = 2) -> list[Any]:
        from tests.support.in_processes import results

        return results(module, folder, words, processes)

    return run
