"""The largest number of bytes of tensors that lived at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from .timing import synchronize


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """The peak of what `work` allocates and has not freed yet, counted from nothing.

    On the CPU torch's allocator tells of every allocation, however short; memory that libraries take beside it is not
    seen. On a GPU it is the peak of torch's own allocator.

    Args:
        device: where the tensors live.
        work: makes them, from the model on; what it returns is kept until the count is over.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = work()
        synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    # One event for each allocation, with its bytes, and for each that is freed, with their negative.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
