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
BASELINES: dict[str, dict[str, Any]] = {
    "sgd": {"optim": "sgd", "sgd_momentum": 0.9, "sgd_nesterov": True, "learning_rate": 0.1, **SCALED},
    "adamw": {"optim": "adamw_torch", "adam_beta2": 0.98, "weight_decay": 0.01, **SCALED},
    "lamb": {"base_optimizer": "lamb", "optim_args": "betas=(0.9,0.98),eps=1e-8", **SCALED},
    "lars": {"base_optimizer": "lars", "optim_args": "momentum=0.9,trust_coefficient=0.02", **SCALED},
    "sam": {"extrap": "sam", "extrap_step_size": 0.1, **SCALED},
    "gaussian": {"extrap": "gaussian", "extrap_step_size": 0.02, **SCALED},
    "local": {"local_steps": 8, "local_sgd_start": 0.5, **SCALED},
}
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": ("AdamW", {"betas": (0.9, 0.98)}),
    "lamb": ("Lamb", {"betas": (0.9, 0.98), "eps": 1e-8}),
    "lars": ("LARS", {"momentum": 0.9, "trust_coefficient": 0.02}),
}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_resolves(name: str, write_config: Callable[[str, dict[str, Any]], Path]) -> None:
    if name in ("lamb", "lars"):
        pytest.importorskip("pytorch_optimizer")
    path = write_config(name, {"task": "image_classification", "num_train_epochs": 10, **BASELINES[name]})
    args = resolve(path).training_arguments
    if name in EXPECTED:
        kind, kwargs = ExtrapTrainer.get_optimizer_cls_and_kwargs(args)
        assert kind.__name__ == EXPECTED[name][0]
        assert {key: kwargs[key] for key in EXPECTED[name][1]} == EXPECTED[name][1]
    scheme = args.extrap_config()
    if name == "sam":
        assert (scheme.direction, scheme.scope, scheme.scaling) == ("gradient", "local", "norm")
        assert (scheme.ascent, scheme.step_size) == (True, 0.1)
    elif name == "gaussian":
        assert (scheme.direction, scheme.scope, scheme.step_size) == ("gaussian", "local", 0.02)
    else:
        assert scheme.direction == "none"
    assert (args.local_steps, args.local_sgd_start) == ((8, 0.5) if name == "local" else (1, 0.5))
    assert args.get_warmup_steps(100) == 25
    assert scaled_learning_rate_factor(args.lr_scaling, 512, args.base_batch_size) == 8


def test_another_optimizer_takes_the_place_of_the_file_s_whole(
    write_config: Callable[[str, dict[str, Any]], Path],
) -> None:
    path = write_config("file", {"task": "image_classification", **BASELINES["sgd"]})
    args = resolve(path, ["--base_optimizer", "nadam"]).training_arguments
    assert (args.base_optimizer, args.optim, args.sgd_momentum) == ("nadam", "adamw_torch_fused", 0)
    args = resolve(path, ["--optim", "sgd"]).training_arguments
    assert (args.optim, args.sgd_momentum, args.sgd_nesterov) == ("sgd", 0.9, True)
    path = write_config("named", {"task": "image_classification", "base_optimizer": "nadam", "optim_args": "eps=1e-3"})
    args = resolve(path, ["--optim", "sgd"]).training_arguments
    assert (args.base_optimizer, args.optim_args, args.sgd_momentum) == (None, None, 0.9)
    args = resolve(path, ["--optim_args", "eps=1e-4"]).training_arguments
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
