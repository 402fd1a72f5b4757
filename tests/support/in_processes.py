"""Run by torchrun as `in_processes.py MODULE FOLDER WORD…`: FOLDER/rank_R.pt is what MODULE.in_processes returns."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist


def leave() -> NoReturn:
    """End the process once all processes have called this, without running the interpreter's cleanup.

    During that cleanup gloo sometimes hangs, when models wrapped for DDP are freed after the process group, or aborts
    ("terminate called without an active exception").
    """
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    module, folder, *words = sys.argv[1:]
    seen = importlib.import_module(module).in_processes(Path(folder), *words)
    torch.save(seen, Path(folder) / f"rank_{dist.get_rank()}.pt")
    leave()
