"""Interleaved rounds, so that a slow minute of the machine meets all methods alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

Step = Callable[[], float]
"""One training step; gives the seconds outside of forward and backward passes."""

WARM_UPS = 3

FEWEST = 3
"""Rounds that are kept where time ends before those that were asked for."""

MANY = 10
"""Rounds for each one that was asked for, where one per cent matters and steps are cheap."""


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(names: Sequence[str], round_: int) -> Sequence[str]:
    """The order of a round: that of the one before, turned round."""
    return names[:: 1 if round_ % 2 else -1]


def interleaved(
    steps: Mapping[str, Step],
    rounds: int,
    tick: Callable[[], object] = lambda: None,
    over: Callable[[], bool] = lambda: False,
    block: int = 1,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each method's step, in rounds of `block` steps each whose order is turned round every time.

    Args:
        steps: one step of each, by name.
        rounds: that are counted, after `WARM_UPS` that are not.
        tick: called after every round.
        over: whether time is, looked at before every block; a round that is not whole is not counted.
        block: steps in a row, whose median is one sample.

    Returns:
        `step` and `optimizer` of each method, by round; of no method where time ended before `FEWEST` rounds.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"step": [], "optimizer": []} for name in steps}
    for round_ in range(WARM_UPS + rounds):
        samples = {}
        for name in in_turn(list(steps), round_):
            if over():
                return found if round_ >= WARM_UPS + min(FEWEST, rounds) else {}
            samples[name] = [_timed(steps[name]) for _ in range(block)]
        if round_ >= WARM_UPS:
            for name, seconds in samples.items():
                for kind, values in zip(("step", "optimizer"), zip(*seconds, strict=True), strict=True):
                    found[name][kind].append(float(np.median(values)))
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
