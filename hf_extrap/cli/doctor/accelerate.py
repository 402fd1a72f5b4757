"""Whether this machine can run a configuration of `accelerate launch`, and as what it is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hf_extrap.recipes.precision import NO_BF16

from .machine import Machine
from .verdict import Verdict

KINDS = {"NO": "one process", "MULTI_GPU": "DDP", "FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}


def judge_accelerate(
    fields: Mapping[str, Any], machine: Machine, verdict: Verdict, judge_file: Callable[[str, Verdict], None]
) -> None:
    """Add what speaks against it to the verdict.

    Args:
        fields: of the YAML file.
        judge_file: judges the DeepSpeed configuration of this path.
    """
    engine = str(fields.get("distributed_type", "NO"))
    processes, machines = int(fields.get("num_processes", 1)), int(fields.get("num_machines", 1))
    on_cpu = bool(fields.get("use_cpu", False))
    verdict.kind = _kind(engine, fields, processes, machines, on_cpu)
    if engine == "MULTI_CPU" and processes > 1:
        verdict.refuse("MULTI_CPU starts one process without a word: use MULTI_GPU with use_cpu: true.")
    elif engine not in KINDS:
        verdict.refuse(f"distributed_type is {engine}; this package knows {', '.join(KINDS)}.")
    if engine == "NO" and processes > 1:
        verdict.refuse(f"distributed_type is NO, which starts one process of the {processes}: use MULTI_GPU.")
    if processes % machines:
        verdict.refuse(f"num_processes is {processes}, which does not divide over {machines} machines.")
    here = processes // machines
    if engine == "DEEPSPEED":
        path = (fields.get("deepspeed_config") or {}).get("deepspeed_config_file")
        if path:
            judge_file(str(path), verdict)
        on_cpu = machine.gpus == 0 or machine.environment.get("DS_ACCELERATOR") == "cpu"
        if on_cpu:
            verdict.note("on this CPU give the Trainer use_cpu: true.")
    _judge_devices(engine, here, machine, verdict, on_cpu)
    _judge_precision(str(fields.get("mixed_precision") or "no"), machine, verdict, on_cpu)
    if engine == "FSDP":
        _judge_fsdp(fields, processes, verdict)
    if machines > 1:
        verdict.note(
            f"this can be one of {machines} machines; main_process_ip is {fields.get('main_process_ip')}, and "
            f"machine_rank {fields.get('machine_rank', 0)}."
        )
    if engine == "MULTI_GPU" and on_cpu and processes > 1:
        verdict.note("a loop of your own needs Accelerator(cpu=True), or its processes train apart.")


def _kind(engine: str, fields: Mapping[str, Any], processes: int, machines: int, on_cpu: bool) -> str:
    name = KINDS.get(engine, engine)
    if engine == "FSDP":
        version = (fields.get("fsdp_config") or {}).get("fsdp_version", 1)
        name = "HSDP" if (fields.get("parallelism_config") or {}) else f"FSDP{version}"
    name += " on the CPU" if on_cpu else ""
    where = f" on {machines} machines" if machines > 1 else ""
    return name if engine == "NO" else f"{name}, {processes} processes{where}"


def _judge_devices(engine: str, here: int, machine: Machine, verdict: Verdict, on_cpu: bool) -> None:
    if on_cpu and engine == "FSDP":
        verdict.refuse("FSDP with use_cpu runs DDP without a word: it needs GPUs.")
    elif on_cpu:
        if here > 1 and "gloo" not in machine.backends:
            verdict.refuse("this PyTorch was built without gloo, which processes on a CPU need.")
    elif engine != "NO":
        if machine.gpus < here:
            fallback = ", and accelerate runs DDP or separate processes on a CPU" if engine == "FSDP" else ""
            verdict.refuse(f"it needs {here} GPUs, and there are {machine.gpus} here{fallback}.")
        if here > 1 and machine.gpus and "nccl" not in machine.backends:
            verdict.refuse("this PyTorch was built without nccl, which processes on GPUs need.")
    if machine.uses_cpu() and (not on_cpu or engine == "DEEPSPEED"):
        verdict.refuse("ACCELERATE_USE_CPU is set, and the Trainer then runs DDP on the CPU in its place: unset it.")


def _judge_precision(precision: str, machine: Machine, verdict: Verdict, on_cpu: bool) -> None:
    if precision == "fp16" and (on_cpu or machine.gpus == 0):
        verdict.refuse("mixed_precision is fp16, which needs a GPU: use bf16 or no.")
    if precision == "bf16" and not on_cpu and machine.gpus and not machine.bf16_gpus:
        verdict.refuse("mixed_precision is bf16, which the GPUs here do not compute in: use fp16 or no.")
    if precision == "bf16" and (on_cpu or machine.gpus == 0) and not machine.bf16_cpu:
        verdict.note(f"mixed_precision is bf16, and this CPU {NO_BF16}: give mixed_precision: 'no'.")


def _judge_fsdp(fields: Mapping[str, Any], processes: int, verdict: Verdict) -> None:
    if int((fields.get("fsdp_config") or {}).get("fsdp_version", 1)) != 2:
        verdict.note("extrapolation is refused under FSDP of version 1: give fsdp_version: 2.")
    sizes = [int(size) for key, size in (fields.get("parallelism_config") or {}).items() if key.endswith("_size")]
    if sizes and math.prod(sizes) != processes:
        verdict.refuse(f"the sizes of parallelism_config multiply to {math.prod(sizes)}, not to {processes} processes.")
