"""Configuration files, told apart by their fields, and the verdict on each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_extrap.recipes.precision import NO_BF16

from .accelerate import judge_accelerate
from .deepspeed import judge_deepspeed
from .machine import Machine
from .verdict import Verdict


def shipped() -> list[Path]:
    """The launch configurations beside the package; none where it was installed without its checkout."""
    folder = Path(__file__).parents[3] / "configs"
    return sorted([*folder.glob("accelerate/*.yaml"), *folder.glob("deepspeed/*.json")])


def judge_all(paths: Sequence[str | Path], machine: Machine) -> list[Verdict]:
    """One verdict a file, in their order.

    Raises:
        FileNotFoundError: for a path that is no file.
        ValueError: for a file that holds no mapping.
    """
    return [judge(path, machine) for path in paths]


def judge(path: str | Path, machine: Machine) -> Verdict:
    """What speaks against running this file here; see `judge_all`."""
    verdict = Verdict(Path(path).name)
    fields = _read(Path(path))
    if "distributed_type" in fields or "compute_environment" in fields:
        judge_accelerate(fields, machine, verdict, lambda inner, verdict: _judge_inner(inner, machine, verdict))
    elif "task" in fields:
        verdict.kind = f"training, {fields['task']}"
        _judge_training(fields, machine, verdict)
    elif Path(path).suffix == ".json":
        verdict.kind = f"DeepSpeed, ZeRO stage {fields.get('zero_optimization', {}).get('stage', 0)}"
        judge_deepspeed(fields, machine, verdict, verdict.name)
    else:
        verdict.refuse("it is none of accelerate's, DeepSpeed's or this package's training configurations.")
    return verdict


def _judge_inner(path: str, machine: Machine, verdict: Verdict) -> None:
    if not Path(path).is_file():
        verdict.refuse(f"deepspeed_config_file {path} does not exist; it is looked for from the current folder.")
        return
    fields = _read(Path(path))
    verdict.kind = verdict.kind.replace(
        "DeepSpeed", f"ZeRO stage {fields.get('zero_optimization', {}).get('stage', 0)}"
    )
    judge_deepspeed(fields, machine, verdict, Path(path).name)


def _judge_training(fields: dict[str, Any], machine: Machine, verdict: Verdict) -> None:
    on_cpu = fields.get("use_cpu") is True or machine.gpus == 0
    if fields.get("fp16") is True and on_cpu:
        verdict.refuse("fp16 is true, which needs a GPU: use bf16 or float32.")
    if fields.get("bf16") is True:
        if not on_cpu and not machine.bf16_gpus:
            verdict.refuse("bf16 is true, which the GPUs here do not compute in.")
        if on_cpu and not machine.bf16_cpu:
            verdict.note(f"bf16 is true, and this CPU {NO_BF16}: give --bf16 false.")
            if fields["task"] == "language_modeling" and not fields.get("model") and "model_type" not in fields:
                verdict.refuse("PyTorch has no LSTM in bf16 for this CPU.")
    if isinstance(fields.get("deepspeed"), str):
        _judge_inner(fields["deepspeed"], machine, verdict)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"configuration {path} does not exist.")
    text = path.read_text(encoding="utf-8")
    try:
        fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"configuration {path} cannot be read: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"configuration {path} holds a {type(fields).__name__}; allowed: a mapping of fields.")
    return fields
