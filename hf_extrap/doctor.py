"""What is installed, which devices are here, and which engines can train on them."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console

from hf_extrap.report import make_table
from hf_extrap.results import versions


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


def engines() -> list[Engine]:
    """Every engine that the package knows of."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        Engine("one process", None, "all directions, virtual workers"),
        Engine("DDP, gloo (CPU)", _gloo_obstacle(), "all directions, virtual workers"),
        Engine("DDP, nccl (GPU)", _nccl_obstacle(gpus), "all directions, virtual workers"),
        Engine("DeepSpeed", _deepspeed_obstacle(), "not yet: the trainer refuses it"),
        Engine("FSDP2", _fsdp_obstacle(gpus), "not yet: the trainer refuses it"),
    ]


def devices() -> list[tuple[str, str]]:
    """Name and description of each device that PyTorch sees here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [("cpu", f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads a process")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            found.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}"))
    elif (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        found.append((str(accelerator), "an accelerator that this package was never tested on"))
    return found


def print_report(console: Console | None = None) -> None:
    """Print versions, devices and engines."""
    console = console or Console()
    console.print(make_table("Versions", ["", ""], [list(item) for item in versions().items()], header=False))
    console.print(make_table("Devices", ["", ""], [list(item) for item in devices()], header=False))
    rows = [[e.name, "yes" if e.obstacle is None else f"no: {e.obstacle}", e.supported] for e in engines()]
    console.print(make_table("Engines", ["engine", "can run here", "extrapolation"], rows, numbers=False))


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


def _nccl_obstacle(gpus: int) -> str | None:
    if gpus == 0:
        return "no NVIDIA GPU"
    if not dist.is_available() or not dist.is_nccl_available():
        return "this PyTorch was built without nccl"
    return None if gpus > 1 else "one GPU; several virtual workers can share it"


def _deepspeed_obstacle() -> str | None:
    return None if importlib.util.find_spec("deepspeed") else "deepspeed is not installed"


def _fsdp_obstacle(gpus: int) -> str | None:
    if not dist.is_available():
        return "this PyTorch was built without torch.distributed"
    return None if gpus > 1 else "needs two GPUs"
