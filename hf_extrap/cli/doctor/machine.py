"""The machine as a launch sees it: versions, devices, backends, environment variables."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

LAUNCH_VARIABLES = {
    "ACCELERATE_USE_CPU": "the Trainer and accelerate run DDP on the CPU, even if DeepSpeed or FSDP is configured",
    "ACCELERATE_USE_DEEPSPEED": "every Trainer started from this shell uses DeepSpeed",
    "ACCELERATE_USE_FSDP": "every Trainer started from this shell uses FSDP",
    "ACCELERATE_MIXED_PRECISION": "default precision",
    "ACCELERATE_TORCH_DEVICE": "device, whatever else is configured",
    "CUDA_VISIBLE_DEVICES": "the GPUs that a process sees",
    "DS_ACCELERATOR": "the device that DeepSpeed uses",
    **dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE"), "a process is one of several"),
    **dict.fromkeys(("MASTER_ADDR", "MASTER_PORT"), "where processes connect"),
    "OMP_NUM_THREADS": "threads of a process",
}
"""Environment variables that change a launch, and what each sets."""


@dataclass(frozen=True)
class Machine:
    """Visible CUDA devices, backends of torch.distributed, why DeepSpeed cannot run, and `LAUNCH_VARIABLES` set."""

    gpus: int = 0
    backends: frozenset[str] = frozenset({"gloo"})
    no_deepspeed: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def deepspeed_on_cpu(self) -> bool:
        """Whether DeepSpeed would run on the CPU."""
        return self.gpus == 0 or self.environment.get("DS_ACCELERATOR") == "cpu"


def this_machine() -> Machine:
    """Inspect this machine; DeepSpeed is imported in a separate process, because the import changes its process."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = {"gloo": _gloo_starts(), "nccl": dist.is_nccl_available()}
    environment = {name: os.environ[name] for name in LAUNCH_VARIABLES if name in os.environ}
    found = Machine(gpus, frozenset(name for name, there in available.items() if there), None, environment)
    return replace(found, no_deepspeed=_no_deepspeed(found.deepspeed_on_cpu))


def _gloo_starts() -> bool:
    try:
        return dist.is_gloo_available() and bool(dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=30)))
    except RuntimeError:
        return False


def _no_deepspeed(on_cpu: bool) -> str | None:
    if importlib.util.find_spec("deepspeed") is None:
        return (
            "DeepSpeed is not installed; it is part of the extra deepspeed: pip install '.[deepspeed]' in the "
            "checkout, or pip install deepspeed."
        )
    if missing := [name for name in ("g++", "ninja") if on_cpu and not shutil.which(name)]:
        return f"DeepSpeed builds an extension for the CPU with {' and '.join(missing)}, not on PATH here."
    done = subprocess.run([sys.executable, "-c", "import deepspeed"], capture_output=True, text=True)
    if done.returncode:
        return f"DeepSpeed cannot be imported: {(done.stderr.strip().splitlines() or ['no message'])[-1]}."
    return None
