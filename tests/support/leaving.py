"""The end of a process that torchrun has started for a test: its results, and its exit."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist


def save_and_leave(seen: dict[str, Any], folder: Path, name: str) -> NoReturn:
    """Save to `name`_R.pt in the folder, R the process, and end the process."""
    torch.save(seen, folder / f"{name}_{dist.get_rank()}.pt")
    leave()


def leave() -> NoReturn:
    """End the process once all processes have called this, without running the interpreter's cleanup.

    During that cleanup gloo sometimes hangs, when models wrapped for DDP outlive the process group, or aborts
    ("terminate called without an active exception").
    """
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)
