"""Where the trials of a method are: on a grid, or where Optuna asks for them."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_extrap.lab.study.specification import Range, Values

Point = dict[str, Any]


def grid(values: Mapping[str, Values]) -> list[Point]:
    """Every combination of the values, the last field changing fastest."""
    lists = [value for value in values.values() if isinstance(value, list)]
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*lists)]


def corners(values: Mapping[str, Values]) -> list[Point]:
    """Points that show whether a space is allowed: all the first or lowest values, and all the last or highest."""
    ends = {n: (v.low, v.high) if isinstance(v, Range) else (v[0], v[-1]) for n, v in values.items()}
    return [{name: pair[end] for name, pair in ends.items()} for end in (0, 1)]


def suggest(
    values: Mapping[str, Values], earlier: Sequence[tuple[Point, float]], seed: int, greater_is_better: bool
) -> Point:
    """The next point by the tree-structured Parzen estimator.

    It depends on the earlier trials and the seed alone, so a study that was cut off asks for the same points.

    Args:
        values: ranges, and lists of choices.
        earlier: points of the trials so far and their scores, infinite where a run diverged.
        seed: of the study and the number of the trial.
        greater_is_better: whether a larger score is.

    Raises:
        ValueError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        needed = "pip install 'hf_extrap[lab]'"
        raise ValueError(f"search.kind is 'optuna', and optuna is not installed: {needed}.") from error
    logging.getLogger("optuna").setLevel(logging.WARNING)
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(value.low, value.high, log=value.log)
        if isinstance(value, Range)
        else optuna.distributions.CategoricalDistribution(value)
        for name, value in values.items()
    }
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(5, max(2, len(values) + 1)))
    study = optuna.create_study(direction="maximize" if greater_is_better else "minimize", sampler=sampler)
    # Optuna takes no infinite values: a diverged trial is as bad as the worst that came back, and a little more.
    sign = -1 if greater_is_better else 1
    worst = max((sign * score for _, score in earlier if math.isfinite(score)), default=0.0)
    for point, score in earlier:
        value = score if math.isfinite(score) else sign * (worst + abs(worst) + 1)
        study.add_trial(optuna.trial.create_trial(params=point, distributions=distributions, value=value))
    asked = study.ask(distributions).params
    # Four digits: the same on every machine, and short enough to be told.
    return {
        name: min(of.high, max(of.low, float(f"{asked[name]:.4g}"))) if isinstance(of, Range) else asked[name]
        for name, of in values.items()
    }
