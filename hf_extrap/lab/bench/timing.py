"""Step time, measured in interleaved rounds so that slow periods of the machine affect all methods, and peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Step = Callable[[], float]
"""One training step; returns the seconds outside of forward and backward passes."""

WARM_UPS = 3

FEWEST = 3
"""Fewest rounds that are kept if time ends before all requested ones."""

MANY = 10
"""Rounds per requested one for cheap steps whose differences are about one per cent."""


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    steps: Mapping[str, Step],
    rounds: int,
    tick: Callable[[], object] = lambda: None,
    over: Callable[[], bool] = lambda: False,
    block: int = 1,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each method's step, in rounds of `block` steps each, with the order reversed every round.

    Args:
        steps: one step of each method, by name.
        rounds: counted rounds, after `WARM_UPS` uncounted ones.
        tick: called after every round.
        over: whether time has ended, called before every block; an incomplete round is not counted.
        block: consecutive steps, whose median is one sample.

    Returns:
        `step` and `optimizer` of each method, by round; empty if time ended before `FEWEST` rounds.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"step": [], "optimizer": []} for name in steps}
    for round_ in range(WARM_UPS + rounds):
        samples = {}
        for name in list(steps)[:: 1 if round_ % 2 else -1]:
            if over():
                return found if round_ >= WARM_UPS + min(FEWEST, rounds) else {}
            samples[name] = np.median([_timed(steps[name]) for _ in range(block)], axis=0)
        for name, sample in samples.items() if round_ >= WARM_UPS else ():
            for key, seconds in zip(("step", "optimizer"), sample, strict=True):
                found[name][key].append(float(seconds))
        tick()
    return found


def _timed(step: Step) -> tuple[float, float]:
    started = time.perf_counter()
    optimizer = step()
    return time.perf_counter() - started, optimizer


def ratio(ours: Sequence[float], base: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """The median over rounds of ours / base, and its 95 % interval by the bootstrap (Efron 1979)."""
    ratios = np.asarray(ours) / np.asarray(base)
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(ratios, (draws, len(ratios))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


def spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, middle, high = np.quantile(np.asarray(seconds), (0.25, 0.5, 0.75))
    return float(middle), float(high - low)


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """The peak of the memory that `work` allocates and has not freed yet, relative to its start.

    On the CPU PyTorch's allocator reports every allocation, however short; memory that libraries allocate themselves is
    not counted. On a GPU it is the peak of PyTorch's allocator.

    Args:
        device: of the tensors.
        work: makes them, including the model; its result is kept until the count is over.
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
    # One event per allocation, with its bytes, and one per deallocation, with their negative.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum([0, *sizes]).max())
