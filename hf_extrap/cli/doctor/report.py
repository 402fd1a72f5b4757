"""The doctor's tables: versions, devices, engines, configurations."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console

from hf_extrap.recipes.precision import cpu_has_bf16
from hf_extrap.recipes.run_folder import versions
from hf_extrap.recipes.tables import make_table

from .machine import LAUNCH_VARIABLES, Machine, untested_versions
from .verdict import Verdict


@dataclass(frozen=True)
class Engine:
    """Whether an engine can run here, and which directions this package supports on it.

    Attributes:
        obstacle: why it cannot run on this machine, in a few words; None if it can.
        supported: what `ExtrapTrainer` does on it.
    """

    name: str
    obstacle: str | None
    supported: str


def engines(machine: Machine) -> list[Engine]:
    """Every engine that the package knows of."""
    deepspeed = None if "deepspeed" in machine.versions else "deepspeed is not installed"
    return [
        Engine("one process", None, "all directions, virtual workers"),
        Engine("DDP, gloo (CPU)", _gloo_obstacle(), "all directions, virtual workers"),
        Engine("DDP, nccl (GPU)", _nccl_obstacle(machine), "all directions, virtual workers"),
        Engine("DeepSpeed, ZeRO 0 to 2", deepspeed, "all directions, virtual workers"),
        Engine("DeepSpeed, ZeRO 3", deepspeed, "global directions, noise"),
        Engine("FSDP2", _fsdp_obstacle(machine), "global directions, noise"),
    ]


def devices() -> list[tuple[str, str]]:
    """Name and description of each device that PyTorch sees here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bf16 = "bf16" if cpu_has_bf16() else "bf16 emulated"
    found = [("cpu", f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads a process, {bf16}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            found.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}"))
    elif (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        found.append((str(accelerator), "an accelerator that this package was never tested on"))
    return found


def print_report(machine: Machine, verdicts: Sequence[Verdict], console: Console | None = None) -> None:
    """Print versions, devices, engines, the environment, and the verdict on each configuration."""
    console = console or Console()
    console.print(make_table("Versions", ["", ""], [list(item) for item in _installed(machine).items()], header=False))
    for sentence in untested_versions(machine):
        console.print(sentence)
    console.print(make_table("Devices", ["", ""], [list(item) for item in devices()], header=False))
    rows = [[e.name, "yes" if e.obstacle is None else f"no: {e.obstacle}", e.supported] for e in engines(machine)]
    console.print(make_table("Engines", ["engine", "can run here", "extrapolation"], rows, numbers=False))
    if machine.environment:
        rows = [[f"{name}={value}", LAUNCH_VARIABLES[name]] for name, value in machine.environment.items()]
        console.print(make_table("Environment", ["variable", "what it changes"], rows, numbers=False))
    if verdicts:
        rows = [[v.name, v.kind, "yes" if v.can_run else "no", " ".join(v.obstacles + v.notes)] for v in verdicts]
        head = ["configuration", "starts", "can run here", "why not, and what to know"]
        console.print(make_table("Configurations", head, rows, numbers=False))


def print_json(machine: Machine, verdicts: Sequence[Verdict]) -> None:
    """Print the same as one JSON object, to be read by programs."""
    content = {
        "versions": _installed(machine),
        "untested_versions": untested_versions(machine),
        "devices": dict(devices()),
        "engines": [
            {"name": e.name, "can_run": e.obstacle is None, "obstacle": e.obstacle, "extrapolation": e.supported}
            for e in engines(machine)
        ],
        "environment": dict(machine.environment),
        "configurations": [
            {"name": v.name, "starts": v.kind, "can_run": v.can_run, "obstacles": v.obstacles, "notes": v.notes}
            for v in verdicts
        ],
    }
    print(json.dumps(content, indent=2))


def _installed(machine: Machine) -> dict[str, str]:
    return {**versions(), "deepspeed": machine.versions.get("deepspeed", "not installed")}


def _gloo_obstacle() -> str | None:
    if not dist.is_available() or not dist.is_gloo_available():
        return "this PyTorch was built without gloo"
    if dist.is_initialized():
        return None
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    except (RuntimeError, ValueError) as error:
        return f"gloo does not start: {error}"
    dist.destroy_process_group()
    return None


def _nccl_obstacle(machine: Machine) -> str | None:
    if machine.gpus == 0:
        return "no NVIDIA GPU"
    if "nccl" not in machine.backends:
        return "this PyTorch was built without nccl"
    return None if machine.gpus > 1 else "one GPU; several virtual workers can share it"


def _fsdp_obstacle(machine: Machine) -> str | None:
    if not dist.is_available():
        return "this PyTorch was built without torch.distributed"
    return None if machine.gpus > 1 else "accelerate runs it on two GPUs or more"
