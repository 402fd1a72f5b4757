"""What this machine has for a launch: GPUs, backends, libraries, compilers, environment variables."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

import torch
import torch.distributed as dist

from hf_extrap.recipes.precision import cpu_has_bf16

TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0", "deepspeed": "0.19.8"}
"""The releases that the tests run with."""

LAUNCH_VARIABLES = {
    "ACCELERATE_USE_CPU": "the Trainer and accelerate run DDP on the CPU, also where DeepSpeed or FSDP is asked for",
    "ACCELERATE_USE_DEEPSPEED": "every Trainer started from this shell uses DeepSpeed",
    "ACCELERATE_USE_FSDP": "every Trainer started from this shell uses FSDP",
    "ACCELERATE_MIXED_PRECISION": "the precision of accelerators that are given none",
    "ACCELERATE_TORCH_DEVICE": "the device of every accelerator, whatever else is asked for",
    "CUDA_VISIBLE_DEVICES": "the GPUs that a process sees",
    "DS_ACCELERATOR": "the device that DeepSpeed uses",
    "LOCAL_RANK": "a process takes itself for one of several",
    "RANK": "a process takes itself for one of several",
    "WORLD_SIZE": "a process takes itself for one of several",
    "MASTER_ADDR": "where processes meet",
    "MASTER_PORT": "where processes meet",
    "OMP_NUM_THREADS": "threads of a process",
}
"""Environment variables that change a launch, and how."""


@dataclass(frozen=True)
class Machine:
    """What a launch needs to know.

    Attributes:
        gpus: CUDA devices that this process sees.
        bf16_gpus: whether they compute in bfloat16.
        bf16_cpu: whether the CPU has instructions for it.
        backends: of torch.distributed: gloo, nccl.
        versions: release of each library in `TESTED` that is installed.
        deepspeed_error: why an installed DeepSpeed cannot be imported; None if it can, or was not tried.
        compilers: of `g++` and `ninja`, those on PATH; DeepSpeed builds its extension for the CPU with them.
        environment: those of `LAUNCH_VARIABLES` that are set.
    """

    gpus: int = 0
    bf16_gpus: bool = False
    bf16_cpu: bool = False
    backends: frozenset[str] = frozenset({"gloo"})
    versions: Mapping[str, str] = field(default_factory=dict)
    deepspeed_error: str | None = None
    compilers: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)

    def uses_cpu(self) -> bool:
        """Whether the environment sends everything to the CPU."""
        return self.environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")


def this_machine() -> Machine:
    """Look; DeepSpeed is imported in a process of its own, which takes seconds, because it changes its importer."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backends = set()
    if dist.is_available():
        backends = {
            name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
        }
    return Machine(
        gpus=gpus,
        bf16_gpus=gpus > 0 and torch.cuda.is_bf16_supported(),
        bf16_cpu=cpu_has_bf16(),
        backends=frozenset(backends),
        versions=_versions(),
        deepspeed_error=_deepspeed_error(),
        compilers=frozenset(name for name in ("g++", "ninja") if shutil.which(name)),
        environment={name: os.environ[name] for name in LAUNCH_VARIABLES if name in os.environ},
    )


def untested_versions(machine: Machine) -> list[str]:
    """One sentence for each library of another release than the tested one."""
    # A local label such as +cpu tells the build, not the release.
    return [
        f"{name} is {version}; tested with {TESTED[name]}."
        for name, version in machine.versions.items()
        if version.split("+")[0] != TESTED[name]
    ]


def _versions() -> dict[str, str]:
    found = {}
    for name in TESTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _deepspeed_error() -> str | None:
    if importlib.util.find_spec("deepspeed") is None:
        return None
    done = subprocess.run([sys.executable, "-c", "import deepspeed"], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
