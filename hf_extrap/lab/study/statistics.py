"""Statistics of runs: means over seeds with bootstrap intervals, the gap closed, and the cost to a target."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.training.figures import series

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        std: their standard deviation, with n − 1; None for one value.
        low, high: percentile bootstrap interval of the mean at `CONFIDENCE`; None for one value. With three seeds it
            spans little more than their range: a spread, not a proof.
        count: how many values.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """The estimate from the values of the seeds; None without values or if one is not finite."""
    if not values or not np.isfinite(values).all():
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None, None, 1)
    low = high = mean
    if len(set(values)) > 1:
        data, rng = (np.asarray(values, float),), np.random.default_rng(0)
        found = bootstrap(data, np.mean, confidence_level=CONFIDENCE, method="percentile", rng=rng)
        low, high = map(float, found.confidence_interval)
    return Estimate(mean, statistics.stdev(values), low, high, len(values))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """The mean of value − baseline over the seeds that both have."""
    return estimate([value - baseline[seed] for seed, value in values.items() if seed in baseline])


def gap_closed(score: float, baseline: float, reference: float, greater_is_better: bool) -> float | None:
    """The share of the generalization gap that a method closes.

    Args:
        score: of the method at a batch size.
        baseline: of the tuned baseline at the same batch size.
        reference: of the small-batch run.
        greater_is_better: whether a larger score is.

    Returns:
        (baseline − score) / (baseline − reference): 1 is the reference's score, 0 the baseline's, and negative is
        worse than the baseline; None where the baseline is as good as the reference, so that there is no gap.
    """
    gap = baseline - reference
    if (gap >= 0) if greater_is_better else (gap <= 0):
        return None
    return (baseline - score) / gap


def gradients_per_step(config: ExtrapConfig, steps: int) -> float:
    """Gradient evaluations a step for each worker, averaged over the run; a share of a batch counts as that share."""
    active = [step for step in range(steps) if config.is_active(step)]
    probes = [step for step in active if step % config.probe_every == 0] if config.step_size == "auto" else []
    extra = config.batch_fraction * len(active) if config.is_fresh else len(probes) if config.is_past else 0.0
    return 1 + extra / max(steps, 1)


def steps_to(target: float, rows: Sequence[Mapping[str, Any]], metric: str, greater_is_better: bool) -> int | None:
    """The first step whose evaluation is at least as good as the target, or None."""
    found = zip(*series(rows, f"eval_{metric}"), strict=True)
    return next((int(s) for s, value in found if (value >= target if greater_is_better else value <= target)), None)
