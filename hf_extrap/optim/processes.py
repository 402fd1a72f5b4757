"""Which process this is, of how many."""

from __future__ import annotations

import time

import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """Of the default process group; (0, 1) where there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def let_gloo_finish(seconds: float = 1.0) -> None:
    """Wait, before the process ends, until gloo's threads have let go of the last collective's tensors.

    To free them they need the interpreter's lock, and torch's teardown holds it while it waits for those threads (seen
    with torch 2.13: the process hangs for ever). Other backends, and one process, do not wait.

    Args:
        seconds: to wait; the threads need microseconds, on a machine that lets them run.
    """
    if dist.is_available() and dist.is_initialized() and "gloo" in dist.get_backend():
        time.sleep(seconds)
