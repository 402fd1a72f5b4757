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
    return [
        {
            name: (value.low, value.high)[end] if isinstance(value, Range) else value[-end]
            for name, value in values.items()
        }
        for end in (0, 1)
    ]


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
        raise ValueError(
            "search.kind is 'optuna', and optuna is not installed: pip install 'hf_extrap[lab]'."
        ) from error
    logging.getLogger("optuna").setLevel(logging.WARNING)
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(value.low, value.high, log=value.log)
        if isinstance(value, Range)
        else optuna.distributions.CategoricalDistribution(value)
        for name, value in values.items()
    }
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(5, max(2, len(values) + 1)))
    study = optuna.create_study(direction="maximize" if greater_is_better else "minimize", sampler=sampler)
    for point, score in earlier:
        # Optuna takes no infinite values: a diverged trial is as bad as the worst that came back, and a little more.
        finite = [value for _, value in earlier if math.isfinite(value)]
        worst = (min(finite) if greater_is_better else max(finite)) if finite else 0.0
        margin = -abs(worst) - 1 if greater_is_better else abs(worst) + 1
        value = score if math.isfinite(score) else worst + margin
        study.add_trial(optuna.trial.create_trial(params=point, distributions=distributions, value=value))
    asked = study.ask(distributions).params
    return {name: _rounded(asked[name], values[name]) for name in values}


def _rounded(value: Any, of: Values) -> Any:
    # Four digits: the same on every machine, and short enough to be told.
    return min(of.high, max(of.low, float(f"{value:.4g}"))) if isinstance(of, Range) else value
