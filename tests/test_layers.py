"""The import layers: `cli` over `lab` over `recipes` over `training` over `optim`; and what each needs installed."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import datasets
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

PACKAGE = Path(__file__).resolve().parents[1] / "hf_extrap"
#: From the bottom up. The root has the public names, which it imports lazily from `optim` and `training`, and
#: `auto_classes`, which names the models of `recipes` without importing them.
LAYERS = ("optim", "training", "auto_classes", "hf_extrap", "recipes", "lab", "cli", "__main__")


def modules() -> dict[str, Path]:
    """Path of every module of the package, by its full name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, *, typing: bool) -> Iterator[str]:
    """Full names that a module imports at any depth, as written; those for type checking alone only with `typing`."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if not typing and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            # Either a module of the package `source`, or a name in the module `source`.
            yield from (f"{source}.{alias.name}" for alias in node.names)


def graph(*, typing: bool) -> dict[str, set[str]]:
    """The modules of this package that each module imports."""
    known = modules()
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = (t if t in known else t.rpartition(".")[0] for t in imports(name, path, typing=typing))
        edges[name] = {target for target in targets if target in known} - {name}
    return edges


def layer(module: str) -> str:
    """The folder below the root that a module is in, or the name of a module of the root."""
    return module.split(".")[1] if "." in module else module


def test_imports_go_down_without_a_cycle() -> None:
    # Imports for type checking alone count here.
    arrows = {(one, other) for one, others in graph(typing=True).items() for other in others}
    assert len(arrows) > 200
    up = [(one, other) for one, other in arrows if LAYERS.index(layer(one)) < LAYERS.index(layer(other))]
    assert not up
    assert {layer(one) for one, other in arrows if layer(other) == "lab"} == {"lab", "cli"}
    # Imports for type checking alone do not count: they are never executed.
    try:
        TopologicalSorter(graph(typing=False)).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "auto_classes.py"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*LAYERS} - {
        "auto_classes",
        "hf_extrap",
        "__main__",
    }


def distributions(requirements: Iterable[str]) -> set[str]:
    """Canonical names of the requirements and of all that they require in turn, without extras."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            waiting += [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:  # an optional platform
            continue
        found.add(name)
    return found


def run_with_only(requirements: Iterable[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process that cannot import any installed distribution beyond the requirements."""
    kept = distributions(requirements) | {"hf-extrap"}
    hidden = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not any(canonicalize_name(owner) in kept for owner in owners)
    }
    restriction = f"""
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
    return subprocess.run([sys.executable, "-c", restriction + code], capture_output=True, text=True, timeout=300)


SETUP = configparser.ConfigParser()
SETUP.read(PACKAGE.parent / "setup.cfg", encoding="utf-8")
#: The requirements of the package without extras.
REQUIRED = SETUP["options"]["install_requires"].split("\n")[1:]


def test_optim_needs_torch_alone() -> None:
    names = sorted(name for name in modules() if layer(name) == "optim")
    code = f"""
import importlib
for name in {names!r}:
    importlib.import_module(name)
import torch
from hf_extrap import ExtrapConfig, Extrapolated
model = torch.nn.Linear(2, 1)
optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=0.1), ExtrapConfig.preset("extrap-past"))
for _ in range(2):
    optimizer.train()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
print(optimizer.step_count, {{"transformers", "accelerate", "deepspeed"}} & sys.modules.keys())
"""
    done = run_with_only(["torch"], code)
    assert done.stdout == "2 set()\n", done.stderr


@pytest.mark.slow
def test_the_library_needs_only_its_requirements(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path / "run")]
    code = f"""
import importlib.util
for name in "babel datasets deepspeed matplotlib optuna pandas PIL sacrebleu scipy sklearn".split():
    assert importlib.util.find_spec(name) is None, name
from transformers import GPT2Config, GPT2LMHeadModel
from hf_extrap import ExtrapTrainer, ExtrapTrainingArguments
arguments = ExtrapTrainingArguments({str(tmp_path)!r}, extrap="extrap", max_steps=2, use_cpu=True, disable_tqdm=True)
rows = [{{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}}] * 16
model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))
trainer = ExtrapTrainer(model, arguments, train_dataset=rows)
trainer.train()
assert trainer.state.global_step == 2
trainer.create_model_card()
from hf_extrap.recipes import get_task
task = get_task("language_modeling")
from hf_extrap.recipes.configuration import resolve
from hf_extrap.recipes.run import run
for start in (lambda: task.prepare(task.arguments_class(), arguments), lambda: run(resolve(None, {words!r}))):
    try:
        start()
    except ModuleNotFoundError as error:
        print(error)
"""
    done = run_with_only(REQUIRED, code)
    sentence = "{0} is not installed; it is part of the extra recipes: pip install '.[recipes]' in the checkout, or "
    sentence += "pip install {0}."
    found = done.stdout.splitlines()[-2:]
    assert found == [sentence.format(name) for name in ("datasets", "matplotlib")], done.stdout + done.stderr


@pytest.mark.slow
def test_local_text_needs_datasets_and_local_images_pillow(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"img": [image] * 4, "label": [0, 1, 0, 1]}, features=features)
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text("a b c d e f\n" * 4)
        (tmp_path / "images").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "images" / f"{name}.parquet")
    code = f"""
from transformers import TrainingArguments
from hf_extrap.recipes import get_task
common = {{"data_cache_dir": {str(tmp_path / "cache")!r}}}
arguments = TrainingArguments({str(tmp_path / "out")!r}, per_device_train_batch_size=1, use_cpu=True)
for name, fields in {{
    "language_modeling": {{"data_dir": {str(tmp_path)!r}, "seq_len": 2, "hidden_size": 4}},
    "image_classification": {{"data_dir": {str(tmp_path / "images")!r}, "depth": 8, "width": 4}},
}}.items():
    task = get_task(name)
    prepared = task.prepare(task.arguments_class(**common, **fields), arguments)
    print(prepared.metric, len(prepared.train_dataset))
"""
    done = run_with_only([*REQUIRED, "datasets", "pillow"], code)
    assert done.stdout == "perplexity 14\naccuracy 4\n", done.stdout + done.stderr
