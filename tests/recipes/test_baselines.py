"""The large-batch baselines from a YAML file: optimizers by name, schemes, scaling with warm-up, post-local SGD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from hf_extrap.cli import main
from hf_extrap.recipes.configuration import resolve
from hf_extrap.recipes.run_folder import RunFolder
from hf_extrap.training.optimizers import scaled_learning_rate_factor
from hf_extrap.training.trainer import ExtrapTrainer

SCALED = {"extrap_virtual_workers": 8, "lr_scaling": "linear", "base_batch_size": 64, "warmup_epochs": 2.5}
SGD: dict[str, Any] = {"optim": "sgd", "sgd_momentum": 0.9, "sgd_nesterov": True, "learning_rate": 0.1}
#: Fields of the file, the class of the base optimizer, and some of its arguments.
BASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (SGD, "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ({"optim": "adamw_torch", "adam_beta2": 0.98, "weight_decay": 0.01}, "AdamW", {"betas": (0.9, 0.98)}),
    (
        {"base_optimizer": "lamb", "optim_args": "betas=(0.9,0.98),eps=1e-8"},
        "Lamb",
        {"betas": (0.9, 0.98), "eps": 1e-8},
    ),
    ({"base_optimizer": "lars", "optim_args": "momentum=0.9"}, "LARS", {"momentum": 0.9}),
]


@pytest.mark.parametrize("fields, kind, expected", BASES)
def test_base_optimizers(
    fields: dict[str, Any], kind: str, expected: dict[str, Any], write_config: Callable[[str, dict[str, Any]], Path]
) -> None:
    if "base_optimizer" in fields:
        pytest.importorskip("pytorch_optimizer")
    path = write_config(kind, {"task": "image_classification", "num_train_epochs": 10, **SCALED, **fields})
    args = resolve(path).training_arguments
    found, kwargs = ExtrapTrainer.get_optimizer_cls_and_kwargs(args)
    assert found.__name__ == kind and {key: kwargs[key] for key in expected} == expected
    assert args.extrap_config().direction == "none" and args.local_steps == 1
    assert args.get_warmup_steps(100) == 25
    assert scaled_learning_rate_factor(args.lr_scaling, 512, args.base_batch_size) == 8


def test_another_optimizer_replaces_that_of_the_file(write_config: Callable[[str, dict[str, Any]], Path]) -> None:
    def resolved(fields: dict[str, Any], *words: str) -> Any:
        return resolve(write_config("file", {"task": "image_classification", **fields}), [*words]).training_arguments

    args = resolved(SGD, "--base_optimizer", "nadam")
    assert (args.base_optimizer, args.optim, args.sgd_momentum) == ("nadam", "adamw_torch_fused", 0)
    args = resolved(SGD, "--optim", "sgd")
    assert (args.optim, args.sgd_momentum, args.sgd_nesterov) == ("sgd", 0.9, True)
    named = {"base_optimizer": "nadam", "optim_args": "eps=1e-3"}
    args = resolved(named, "--optim", "sgd")
    assert (args.base_optimizer, args.optim_args, args.sgd_momentum) == (None, None, 0.9)
    args = resolved(named, "--optim_args", "eps=1e-4")
    assert (args.base_optimizer, args.optim_args) == ("nadam", "eps=1e-4")


def test_lamb_with_local_steps_runs_from_a_file(tiny_language_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    words = ["--base_optimizer", "lamb", "--extrap", "none", "--extrap_virtual_workers", "2", "--max_steps", "6"]
    words += ["--eval_strategy", "steps", "--eval_steps", "3", "--save_strategy", "no"]
    finals = {}
    for name, more in {"together": [], "local": ["--local_steps", "2", "--local_sgd_start", "0.34"]}.items():
        folder = tmp_path / name
        set_seed(0)
        assert main(["train", str(tiny_language_model), "--output_dir", str(folder), *words, *more]) == 0
        metrics = RunFolder(folder).read_metrics()
        assert metrics["optimizer"] == "Lamb"
        history = RunFolder(folder).read_history()
        finals[name] = [row["eval_loss"] for row in history if "eval_loss" in row]
    # The switch is at step 3 of 6.
    assert finals["local"][0] == finals["together"][0]
    assert 1e-6 < abs(finals["local"][1] - finals["together"][1]) < 0.5
    assert torch.isfinite(torch.tensor(finals["local"])).all()
