"""Every file that is read, mutated: it is refused in a sentence, or what is read is right; no other error, no hang."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hf_extrap.cli import main
from hf_extrap.lab.study import execution
from hf_extrap.lab.study.folder import StudyFolder
from hf_extrap.lab.study.plan import Plan
from hf_extrap.lab.study.report import markdown, summary
from hf_extrap.lab.study.results import gather
from hf_extrap.lab.study.runner import run_study
from hf_extrap.lab.study.specification import read_study
from hf_extrap.recipes.configuration import resolve
from hf_extrap.recipes.data import DataArguments, check_texts, load_splits
from hf_extrap.recipes.image_classification.images import decode
from hf_extrap.recipes.image_classification.task import ImageClassificationArguments
from hf_extrap.recipes.language_modeling.text import token_streams
from hf_extrap.recipes.run_folder import RunFolder
from hf_extrap.recipes.saved_run import load_saved_run
from tests.conftest import TINY_LANGUAGE_MODEL
from tests.lab.study.conftest import RECIPE, STUDY, ComputedRuns
from tests.support.soak import count

CASES = count(quick=30, soak=300)
"""Of each target."""
SECONDS = 20

WORDS = ["alpha beta gamma", "beta gamma delta epsilon", "gamma alpha", "epsilon delta alpha beta"]


class Pickled:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutate(path: Path, others: list[Path], outside: Path, rng: random.Random) -> str:
    """Mutate one file; return what was done."""
    content = path.read_bytes()
    kinds = ["delete", "empty", "halve", "flip", "garbage", "swap", "pickle", "folder", "dangling link", "link out"]
    is_text = path.suffix in (".json", ".jsonl", ".yaml", ".txt")
    # As often as all others together: they pass the parsers.
    kind = rng.choice(kinds + ["huge number", "wrong type", "deep", "no field", "bytes"] * 2 if is_text else kinds)
    path.unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "halve":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flip":
        changed = bytearray(content or b" ")
        for _ in range(rng.choice([1, 1, 8])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif kind == "garbage":
        path.write_bytes(rng.randbytes(rng.choice([1, 100, 5000])))
    elif kind == "swap":
        path.write_bytes(rng.choice(others).read_bytes() if others else b"another file")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Pickled(outside / "executed"), protocol=rng.choice([0, 2, 4])))
    elif kind == "folder":
        path.mkdir()
        (path / "file").write_text("x")
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nothing")
    elif kind == "link out":
        (outside / "target").write_bytes(rng.randbytes(50))
        path.symlink_to(outside / "target")
    elif kind == "deep":
        path.write_text(rng.choice(["[" * 100_000, '{"a":' * 50_000, "- " * 20_000, '{"text": ' + "[" * 3000]))
    elif kind == "bytes":
        path.write_bytes(content.replace(b'"', rng.choice([b"\x00", b"\xff", b"'", b""]), rng.choice([1, -1])))
    elif kind != "delete":
        path.write_text(changed_value(content.decode(), kind, path.suffix, rng))
    return f"{kind} {path.name}"


def changed_value(text: str, kind: str, suffix: str, rng: random.Random) -> str:
    """The text with a random value of its YAML or JSON, or of one line of it, replaced or left out."""
    lines = text.splitlines()
    number = rng.randrange(len(lines)) if suffix == ".jsonl" and lines else None
    try:
        content = yaml.safe_load(text) if suffix == ".yaml" else json.loads(text if number is None else lines[number])
    except ValueError:
        return "1e999"
    huge = [10**400, -(10**30), 1e308, float("inf"), float("nan"), 2**63, -1, 0]
    wrong = [None, True, "text", "../../x", [], {}, [1], {"a": 1}, 3, 2.5, "", "\ud7ff\u0000"]
    places: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        node = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            waiting.append(value)
    if not places:
        content = rng.choice(wrong)
    else:
        node, key = rng.choice(places)
        if kind == "no field":
            del node[key]
        else:
            node[key] = rng.choice(huge if kind == "huge number" else wrong)
    if suffix == ".yaml":
        return yaml.safe_dump(content)
    if number is None:
        return json.dumps(content)
    lines[number] = json.dumps(content)
    return "\n".join([*lines, ""])


@dataclass
class Target:
    """Files and their reader.

    Attributes:
        make: writes the files into a folder.
        read: reads them.
        recovers: whether reading must always give the same, as from a cache.
        exempt: names of files that are not mutated.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    recovers: bool = False
    exempt: tuple[str, ...] = ()


def make_configuration(folder: Path) -> None:
    fields = TINY_LANGUAGE_MODEL | {"lr_milestones": [0.5], "optim_args": "momentum=0.5"}
    (folder / "run.yaml").write_text(yaml.safe_dump(fields | {"extrap": "extrap", "extrap_step_ratio": 0.5}))


def read_configuration(folder: Path) -> Any:
    return resolve(folder / "run.yaml", ["--output_dir", str(folder / "out")]).given


SMALL = STUDY | {"batches": STUDY["batches"][:1], "search": {"trials": 2}, "seeds": [1, 2]}
SMALL["methods"] = {name: {"search": {"learning_rate": [1, 10]}} for name in ("none", "extrap")}


def make_study(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "study.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))


def make_run(folder: Path) -> None:
    run = RunFolder(folder)
    run.write_configuration({"arguments": {"seed": 1, "learning_rate": 0.1}, "command": "hf-extrap train"})
    run.write_history([{"step": step, "loss": 2.0 / step, "epoch": 0.1 * step} for step in range(1, 9)])
    run.write_metrics({"status": "finished", "steps": 8, "eval": {"eval_loss": 0.25}})


def read_run(folder: Path) -> Any:
    run = RunFolder(folder)
    try:
        run.check({"seed": 1, "learning_rate": 0.1}, resume=True)
    except ValueError as error:
        assert str(folder) in str(error)
    return run.read_configuration()["arguments"], run.read_history(), run.read_metrics()


def study_reader(files: Path, plan: Plan) -> Target:
    def read(folder: Path) -> Any:
        results = gather(plan, StudyFolder(folder))
        return summary(results), markdown(results, {}, "hf-extrap study report")

    return Target(lambda folder: shutil.copytree(files, folder, dirs_exist_ok=True) and None, read)


def make_texts(ending: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = WORDS if ending == "txt" else [json.dumps({"text": text, "id": i}) for i, text in enumerate(WORDS)]
        for split in ("train", "validation", "test"):
            (folder / f"{split}.{ending}").write_text("\n".join([*rows, ""]))

    return make


def read_texts(folder: Path) -> Any:
    arguments = DataArguments(data_dir=str(folder), data_cache_dir=str(folder.parent / "cache"))
    splits = load_splits(arguments, columns=("text",), builtin=datasets.DatasetDict)
    check_texts(splits, "text")
    tokenizer, ids = token_streams(splits, arguments.cache_root)
    return len(tokenizer), {name: stream.tolist() for name, stream in ids.items()}


def make_images(folder: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split in ("train", "validation", "test"):
        images = [Image.fromarray(np.full((4, 4, 3), 40 * i, dtype=np.uint8)) for i in range(4)]
        rows = datasets.Dataset.from_dict({"img": images, "label": [0, 1, 0, 1]}, features=features)
        rows.to_parquet(str(folder / f"{split}.parquet"))


def read_images(folder: Path) -> Any:
    arguments = ImageClassificationArguments(data_dir=str(folder), data_cache_dir=str(folder.parent / "cache"))
    splits = load_splits(arguments, columns=("img", "label"), builtin=datasets.DatasetDict)
    found = decode(splits, arguments.cache_root, "img", "label")
    return {name: (part.images.tolist(), part.labels.tolist()) for name, part in found.items()}


def cache_of(make: Callable[[Path], None], read: Callable[[Path], Any]) -> Target:
    """The cache of prepared data: `folder` holds it, beside the folder with the data."""

    def place(folder: Path) -> Path:
        data = folder.parent / "data"
        if not data.exists():
            data.mkdir()
            make(data)
        link = folder.parent / "cache"
        if not link.is_symlink():
            link.symlink_to(folder)
        return data

    return Target(lambda folder: read(place(folder)) and None, lambda folder: read(place(folder)), recovers=True)


def model_folder(tmp: Path) -> Target:
    data = tmp / "corpus"
    data.mkdir()
    make_texts("txt")(data)
    fields = {"data_dir": data, "data_cache_dir": tmp / "corpus-cache", "seq_len": 2, "hidden_size": 8, "use_cpu": True}
    fields |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "num_hidden_layers": 1}

    def prepare(model: Path | None) -> Any:
        words = [f"--{name}={value}" for name, value in (fields | ({"model": model} if model else {})).items()]
        found = resolve(None, [*words, "--output_dir", str(tmp / "out")])
        torch.manual_seed(0)
        return found.task.prepare(found.task_arguments, found.training_arguments)

    def make(folder: Path) -> None:
        prepared = prepare(None)
        prepared.model.save_pretrained(folder)
        prepared.processing_class.save_pretrained(folder)

    def read(folder: Path) -> Any:
        model = prepare(folder).model
        # What was read is the saved weights, not new ones.
        return {name: value.tolist() for name, value in model.state_dict().items()}

    return Target(make, read, exempt=("model.safetensors",))


def saved_run(tmp: Path, patch: pytest.MonkeyPatch) -> Target:
    """The files of a trained run that describe it, and the run rebuilt from them."""
    (tmp / "run.yaml").write_text(yaml.safe_dump(TINY_LANGUAGE_MODEL | {"max_steps": 1, "evaluate_untrained": False}))
    assert main(["train", str(tmp / "run.yaml"), "--output_dir", str(tmp / "run"), "--save_strategy", "no"]) == 0

    def make(folder: Path) -> None:
        for name in ("run.json", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            shutil.copy(tmp / "run" / name, folder)

    def read(folder: Path) -> Any:
        return {name: value.tolist() for name, value in load_saved_run(folder).trainer.model.state_dict().items()}

    return Target(make, read, exempt=("model.safetensors",))


def study_files(tmp: Path, patch: pytest.MonkeyPatch) -> tuple[Path, Plan]:
    """The folder of a study whose runs are computed, and its plan."""
    make_study(tmp)
    patch.setattr(execution, "run", ComputedRuns())
    assert run_study(tmp / "study.yaml", output_dir=tmp / "files") == 0
    return tmp / "files", Plan(read_study(tmp / "study.yaml"))


TARGETS: dict[str, Callable[[Path, pytest.MonkeyPatch], Target]] = {
    "configuration": lambda tmp, patch: Target(make_configuration, read_configuration),
    "study": lambda tmp, patch: Target(make_study, lambda folder: read_study(folder / "study.yaml").methods),
    "run folder": lambda tmp, patch: Target(make_run, read_run),
    "rows of a study": lambda tmp, patch: study_reader(*study_files(tmp, patch)),
    "text": lambda tmp, patch: Target(make_texts("txt"), read_texts),
    "json lines": lambda tmp, patch: Target(make_texts("jsonl"), read_texts),
    "images": lambda tmp, patch: Target(make_images, read_images),
    "cache of texts": lambda tmp, patch: cache_of(make_texts("jsonl"), read_texts),
    "cache of images": lambda tmp, patch: cache_of(make_images, read_images),
    "saved run": saved_run,
    "model": lambda tmp, patch: model_folder(tmp),
}


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Transformers warns of what is then refused.
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    places = {place: tmp_path / place for place in ("made", "outside", "at", "at/files")}
    for place in places.values():
        place.mkdir()
    target = TARGETS[name](places["made"], monkeypatch)
    pristine, working = tmp_path / "pristine", places["at/files"]
    target.make(working)
    expected = target.read(working)
    shutil.copytree(working, pristine)
    outcomes = {"refused": 0, "same": 0, "other": 0}
    problems = []
    for case in range(CASES):
        rng = random.Random(f"{name} {case}")
        shutil.rmtree(working)
        shutil.copytree(pristine, working)
        files = sorted(path for path in working.rglob("*") if path.is_file() and path.name not in target.exempt)
        done = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            path = rng.choice(files)
            done.append(mutate(path, [other for other in files if other != path], places["outside"], rng))
            files.remove(path)
            if not files:
                break
        try:
            with time_limit(SECONDS):
                found = target.read(working)
            outcomes["same" if found == expected else "other"] += 1
            if target.recovers and found != expected:
                problems.append(f"case {case}, {done}: the damaged cache was used")
        except (ValueError, OSError) as error:
            outcomes["refused"] += 1
            if target.recovers:
                problems.append(f"case {case}, {done}: {error!r}")
            if not str(error) or len(str(error)) > 2000:
                problems.append(f"case {case}, {done}: the error is {str(error)[:100]!r}")
        except Exception as error:
            problems.append(f"case {case}, {done}: {error!r:.300}")
        if (places["outside"] / "executed").exists():
            problems.append(f"case {case}, {done}: a pickle was loaded")
            os.remove(places["outside"] / "executed")
    print(name, outcomes)
    assert not problems, f"{len(problems)} of {CASES}:\n" + "\n".join(problems)
    # The mutations reach the readers.
    assert target.recovers or outcomes["refused"] > CASES / 10, outcomes
