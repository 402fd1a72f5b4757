"""What a run was trained on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object


def cpu_model() -> str:
    """The name of the CPU, if the system knows it, and the instruction set that PyTorch uses."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'} ({torch.backends.cpu.get_cpu_capability()})"


def hardware(device: torch.device) -> dict[str, Any]:
    """Name of the accelerator, if there is one, model of the CPU, and number of machines; a collective call."""
    return {
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": cpu_model(),
        "machines": len(set(gather_object([platform.node()]))),
    }
