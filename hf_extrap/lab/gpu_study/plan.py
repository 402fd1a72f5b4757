"""Which runs, in which order: the most informative first, so that a study that is cut short has a result."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .methods import EXTRAS, METHODS, Method
from .training import Run, Setting

RATES = (3.2, 6.4, 1.6, 12.8)
"""Peak learning rates at the large batch, those where methods differ most first."""
SMALL_BATCH_RATE = 0.2
"""Of a batch of one worker: 0.1 at 128 images (He et al. 2016), scaled linearly."""
SHARE = 0.55
"""Of the time, for the first stage."""
FEWEST_LONG = 10
"""Runs of the second stage that a number of epochs must leave room for: two seeds of five methods."""


def first_stage(setting: Setting) -> list[Run]:
    """Every method at every rate, one rate after another; then the extras."""
    methods = [*METHODS, *EXTRAS]
    order = [(m, r) for some in (METHODS, EXTRAS) for r in RATES for m in some]
    assert len(order) == len(methods) * len(RATES)
    return [Run("a", m, r, 0, setting.epochs, setting.workers) for m, r in order]


def second_stage(rows: Sequence[Mapping[str, Any]], epochs: int, setting: Setting) -> list[Run]:
    """The best of each family by validation accuracy, ours also with post-local SGD, and the small batch; new seeds."""
    runs: list[Run] = []
    for seed in setting.seeds:
        for family in ("baseline", "ours", "msam"):
            if best := best_of(rows, family):
                method, rate = best
                runs.append(Run("b", method, rate, seed, epochs, setting.workers))
        if best := best_of(rows, "ours"):
            runs.append(Run("b", *best, seed, epochs, setting.workers, post_local=True))
        nesterov = next(m for m in METHODS if m.name == "Nesterov")
        runs.append(Run("b", nesterov, SMALL_BATCH_RATE, seed, epochs, 1))
    return runs


def best_of(rows: Sequence[Mapping[str, Any]], family: str) -> tuple[Method, float] | None:
    """Method and rate with the highest validation accuracy of the first stage."""
    known = {m.name: m for m in (*METHODS, *EXTRAS)}
    tuned = [r for r in rows if r["stage"] == "a" and r["family"] == family and not r["diverged"]]
    if not tuned:
        return None
    best = max(tuned, key=lambda row: row["validation"])
    return known[best["name"]], best["rate"]


def how_many(seconds: float, rate: float, images: int, setting: Setting) -> int:
    """Runs of the first stage that fit into its share of the time.

    Args:
        seconds: left for both stages.
        rate: images a second, all slots together.
        images: of the training split.
        setting: epochs of the runs.
    """
    fitting = int(SHARE * seconds * rate / (setting.epochs * images))
    return min(max(fitting, 1), len(RATES) * (len(METHODS) + len(EXTRAS)))


def how_long(seconds: float, rate: float, images: int, setting: Setting) -> int:
    """Epochs of a run of the second stage: the most of which `FEWEST_LONG` runs fit into the seconds left."""
    fitting = [epochs for epochs in setting.long_epochs if FEWEST_LONG * epochs * images <= seconds * rate]
    return fitting[0] if fitting else setting.long_epochs[-1]


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
