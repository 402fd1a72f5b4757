"""Whether this machine can run a DeepSpeed configuration with Extrapolated as its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_extrap.recipes.precision import NO_BF16

from .machine import Machine
from .verdict import Verdict


def judge_deepspeed(fields: Mapping[str, Any], machine: Machine, verdict: Verdict, name: str) -> None:
    """Add what speaks against it to the verdict.

    Args:
        fields: of the JSON file.
        name: of the file, for the sentences.
    """
    on_cpu = machine.gpus == 0 or machine.environment.get("DS_ACCELERATOR") == "cpu"
    _judge_installation(machine, verdict, on_cpu)
    zero = fields.get("zero_optimization", {})
    if fields.get("fp16", {}).get("enabled") is True and machine.gpus == 0:
        verdict.refuse(f"{name} enables fp16, which DeepSpeed refuses on a CPU: use bf16 or float32.")
    if fields.get("bf16", {}).get("enabled") is True:
        if on_cpu and not machine.bf16_cpu:
            verdict.note(f"{name} enables bf16, and this CPU {NO_BF16}: give bf16 enabled: false.")
        elif not on_cpu and not machine.bf16_gpus:
            verdict.refuse(f"{name} enables bf16, which the GPUs here do not compute in.")
    if "optimizer" in fields:
        verdict.note(f"{name} has an optimizer of its own: extrapolation is refused unless it is taken out.")
    elif fields.get("zero_allow_untested_optimizer") is not True and zero.get("stage", 0):
        verdict.refuse(f"{name} lacks zero_allow_untested_optimizer: true, without which Extrapolated is refused.")
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and fields.get("zero_force_ds_cpu_optimizer") is not False:
        verdict.refuse(f"{name} offloads the optimizer, which needs zero_force_ds_cpu_optimizer: false.")
    if "gradient_clipping" not in fields:
        verdict.note(f"{name} gives no gradient_clipping, and DeepSpeed then clips at 1.0.")
    if zero.get("stage") == 3:
        verdict.note("ZeRO-3 takes global directions and noise alone.")


def _judge_installation(machine: Machine, verdict: Verdict, on_cpu: bool) -> None:
    if "deepspeed" not in machine.versions:
        verdict.refuse("DeepSpeed is not installed: pip install 'hf_extrap[deepspeed]'.")
    elif machine.deepspeed_error:
        verdict.refuse(f"DeepSpeed is installed and cannot be imported: {machine.deepspeed_error}.")
    missing = sorted({"g++", "ninja"} - machine.compilers)
    if on_cpu and missing:
        verdict.refuse(f"DeepSpeed builds an extension for the CPU with {' and '.join(missing)}, not on PATH here.")
    if on_cpu and "gloo" not in machine.backends:
        verdict.refuse("this PyTorch was built without gloo, which processes on a CPU need.")
