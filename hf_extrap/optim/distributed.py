"""The rank of this process and the number of processes."""

from __future__ import annotations

import time

import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """Of the default process group; (0, 1) where there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def let_gloo_finish(seconds: float = 1.0) -> None:
    """Wait, before the process ends, until gloo's threads have freed the tensors of the last collective.

    To free them they need the interpreter's lock, which torch's teardown holds while it waits for those threads (seen
    with torch 2.13: the process hangs). Other backends, and a single process, do not wait.

    Args:
        seconds: to wait; the threads need microseconds once they are scheduled.
    """
    if dist.is_available() and dist.is_initialized() and "gloo" in dist.get_backend():
        time.sleep(seconds)
