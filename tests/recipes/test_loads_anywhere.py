"""Saved models load by Auto classes and pipelines: after `import hf_extrap`, and without this package."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, MarianMTModel, pipeline

from hf_extrap import ExtrapTrainer
from hf_extrap.recipes import TASKS
from hf_extrap.recipes.inference import predict
from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM, ExtrapResNetForImageClassification
from tests.support.tiny_trainer import Sentences, arguments

#: What a process without this package runs first.
WITHOUT = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_extrap":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
try:
    import hf_extrap
except ModuleNotFoundError:
    print("not importable")
"""


def digit() -> Image.Image:
    return Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


def python(code: str, folder: Path, *options: str, **environment: str) -> list[str]:
    """The lines that a new process prints, in that folder, without the variables of the tests."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables = {**kept, "HF_HOME": str(folder / "home"), **environment}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def snippet(run: Path) -> str:
    """The first block of Python in a card, for this folder."""
    found = re.search(r"```python\n(.*?)\n```", (run / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1].replace("path/to/this/model", str(run))


def test_everything_loads_where_the_package_is_not_installed(task_runs: Path, tmp_path: Path) -> None:
    digit().save(tmp_path / "image.png")
    code = f"""
{WITHOUT}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
text, images = {str(task_runs / "language_modeling")!r}, {str(task_runs / "image_classification")!r}
try:
    AutoModelForCausalLM.from_pretrained(text, trust_remote_code=False)
except ValueError as error:
    print("custom code" in str(error))
for auto, path in ((AutoConfig, text), (AutoModel, text), (AutoModelForCausalLM, text + "/checkpoint-3"),
                   (AutoConfig, images), (AutoModelForImageClassification, images)):
    found = type(auto.from_pretrained(path, trust_remote_code=True))
    print(found.__module__.partition(".")[0], found.__name__)
# A model that was loaded from its own code carries it further.
model = AutoModelForCausalLM.from_pretrained(text, trust_remote_code=True)
model.save_pretrained("again")
print(type(AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)).__name__)
print("snippets")
"""
    code += "\n".join(snippet(task_runs / task) for task in TASKS)
    # DeepSpeed prints a warning where it is installed.
    lines = [line for line in python(code, tmp_path, "-P", HF_HUB_OFFLINE="1") if "[WARNING]" not in line]
    names = ["ExtrapLstmConfig", "ExtrapLstmModel", "ExtrapLstmForCausalLM"]
    names += ["ExtrapResNetConfig", "ExtrapResNetForImageClassification"]
    loaded = [f"transformers_modules {name}" for name in names]
    assert lines[:9] == ["not importable", "True", *loaded, "ExtrapLstmForCausalLM", "snippets"]
    classes, generated, translated = lines[9:]
    assert generated.startswith("the") and len(generated.split()) > 1
    assert isinstance(ast.literal_eval(translated), list)
    # The pipeline preprocesses as the evaluation does.
    ((expected,),) = predict(task_runs / "image_classification", [tmp_path / "image.png"])
    assert f"'label': '{expected.label}'" in classes
    score = float(re.search(r"'score': ([0-9.e-]+)", classes)[1])  # type: ignore[index]
    assert score == pytest.approx(expected.probability, rel=1e-5)


@pytest.mark.parametrize(
    "imports", ["import hf_extrap, transformers", "from transformers import AutoModel, pipeline; import hf_extrap"]
)
def test_importing_the_package_registers_its_models(
    imports: str, task_runs: Path, repository: Path, tmp_path: Path
) -> None:
    code = f"""
import sys
{imports}
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, pipeline
text, images = {str(task_runs / "language_modeling")!r}, {str(task_runs / "image_classification")!r}
print(type(AutoConfig.from_pretrained(text)).__module__)
print(type(AutoModelForCausalLM.from_pretrained(text)).__module__)
print(type(AutoModelForImageClassification.from_pretrained(images)).__module__)
# Registered classes take precedence over the code that a model carries.
print(type(AutoModelForCausalLM.from_pretrained(text, trust_remote_code=True)).__module__)
print(type(pipeline("text-generation", text).model).__module__)
"""
    lines = python(code, tmp_path, PYTHONPATH=str(repository), HF_HUB_OFFLINE="1")
    lstm, resnet = "hf_extrap.recipes.models.lstm", "hf_extrap.recipes.models.resnet"
    assert [line for line in lines if line.startswith("hf_extrap")] == [lstm, lstm, resnet, lstm, lstm]


def test_importing_the_package_imports_neither_torch_nor_transformers(repository: Path, tmp_path: Path) -> None:
    code = "import sys, hf_extrap; print({'torch', 'transformers', 'numpy', 'yaml'} & sys.modules.keys())"
    assert python(code, tmp_path, PYTHONPATH=str(repository)) == ["set()"]


def test_runs_and_checkpoints_carry_their_code(task_runs: Path) -> None:
    for run in (task_runs / "language_modeling", task_runs / "language_modeling" / "checkpoint-3"):
        assert {path.name for path in run.glob("*.py")} == {"lstm.py", "vocabulary_head.py"}
        assert json.loads((run / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "lstm.ExtrapLstmConfig",
            "AutoModel": "lstm.ExtrapLstmModel",
            "AutoModelForCausalLM": "lstm.ExtrapLstmForCausalLM",
        }
    assert [path.name for path in (task_runs / "image_classification").glob("*.py")] == ["resnet.py"]
    assert not list((task_runs / "translation").glob("*.py"))
    # A copied file must find all that it imports beside it.
    for path in task_runs.glob("*/*.py"):
        imported = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", path.read_text(), re.MULTILINE)
        assert not [name for name in imported if name.startswith("hf_extrap")]
        assert all((path.parent / f"{name[1:]}.py").is_file() for name in imported if name.startswith("."))


def test_pipelines_after_importing_the_package(task_runs: Path) -> None:
    generate = pipeline("text-generation", str(task_runs / "language_modeling"))
    assert isinstance(generate.model, ExtrapLstmForCausalLM)
    assert generate("the", max_new_tokens=5)[0]["generated_text"].startswith("the")
    classify = pipeline("image-classification", str(task_runs / "image_classification"))
    assert isinstance(classify.model, ExtrapResNetForImageClassification)
    image = digit()
    # Evaluation passes uint8 images, which the model normalizes itself.
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).unsqueeze(0)
    with torch.no_grad():
        expected = classify.model(pixel_values=pixels).logits.softmax(-1)[0].sort(descending=True)
    found = classify(image)
    assert [one["score"] for one in found] == pytest.approx(expected.values[: len(found)].tolist(), rel=1e-5)
    # Transformers 5 has no translation pipeline; a translation model is used by `generate`.
    with pytest.raises(KeyError, match="has been removed from transformers"):
        pipeline("translation", str(task_runs / "translation"))
    assert type(AutoModelForCausalLM.from_pretrained(task_runs / "language_modeling")) is ExtrapLstmForCausalLM
    assert MarianMTModel.from_pretrained(task_runs / "translation").config.is_encoder_decoder


def test_a_model_that_fsdp_has_renamed_carries_its_own_code(tmp_path: Path) -> None:
    shape = {"vocab_size": 9, "embedding_size": 4, "hidden_size": 4, "num_hidden_layers": 1}
    model = ExtrapLstmForCausalLM(ExtrapLstmConfig(**shape))
    # fully_shard gives a module a class of its own, which belongs to a module of torch.
    model.__class__ = type("FSDPExtrapLstmForCausalLM", (ExtrapLstmForCausalLM,), {"__module__": "torch.distributed"})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "lstm.ExtrapLstmForCausalLM"
    assert {path.name for path in tmp_path.glob("*.py")} == {"lstm.py", "vocabulary_head.py"}
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is ExtrapLstmForCausalLM


def in_processes(folder: Path) -> dict[str, int]:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "embedding_size": 4, "hidden_size": 4, "num_hidden_layers": 1}
    model = ExtrapLstmForCausalLM(ExtrapLstmConfig(**shape))
    fields = {"extrap": "extrap-past", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = ExtrapTrainer(model, arguments(folder, **fields), train_dataset=Sentences(16))
    trainer.train()
    trainer.save_model()
    return {"rank": trainer.args.process_index, "processes": trainer.args.world_size}


@pytest.mark.distributed
def test_models_of_several_processes_carry_their_code(tmp_path: Path, run_processes: Callable[..., list[Any]]) -> None:
    results = run_processes("tests.recipes.test_loads_anywhere", tmp_path)
    assert results == [{"rank": 0, "processes": 2}, {"rank": 1, "processes": 2}]
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert {path.name for path in folder.glob("*.py")} == {"lstm.py", "vocabulary_head.py"}
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is ExtrapLstmForCausalLM
