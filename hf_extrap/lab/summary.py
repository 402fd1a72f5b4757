"""The statistics of a comparison: each preset at its best learning rate, over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes.figures import series

COLUMNS = (
    "preset",
    "learning rate",
    "validation",
    "test",
    "steps to target",
    "seconds a step",
    "gradients a step",
    "diverged",
)


def gradients_per_step(config: ExtrapConfig, steps: int) -> float:
    """Gradient evaluations a step for each worker, averaged over the run; a share of a batch counts as that share."""
    if steps == 0:
        return 1.0
    extra = 0.0
    for step in range(steps):
        if not config.is_active(step):
            continue
        if config.is_fresh:
            extra += config.batch_fraction
        elif config.is_past and config.step_size == "auto" and step % config.probe_every == 0:
            extra += 1
    return 1 + extra / steps


def steps_to(target: float, rows: Sequence[dict[str, Any]], metric: str, greater_is_better: bool) -> int | None:
    """The first step whose evaluation is at least as good as the target, or None."""
    for step, value in zip(*series(rows, f"eval_{metric}"), strict=True):
        if value >= target if greater_is_better else value <= target:
            return int(step)
    return None


def summarise(frame: pd.DataFrame, target: float | None = None) -> tuple[pd.DataFrame, dict[str, float], float | None]:
    """Each preset at its best learning rate.

    Args:
        frame: one row a run: preset, learning_rate, seed, metric, greater_is_better, validation, test,
            seconds_per_step, gradients_per_step, diverged, history.
        target: value for "steps to target"; None: the worst preset's mean, at its best learning rate.

    Returns:
        The table (numbers, with a `_std` beside each mean), the best learning rate of each preset, and the target.
    """
    greater, metric = bool(frame["greater_is_better"].iloc[0]), str(frame["metric"].iloc[0])
    worst = -math.inf if greater else math.inf
    scored = frame.assign(score=frame["validation"].where(~frame["diverged"], worst).fillna(worst))
    means = scored.groupby(["preset", "learning_rate"], sort=False)["score"].mean().unstack()
    best = (means.idxmax(axis=1) if greater else means.idxmin(axis=1)).to_dict()
    chosen = {preset: frame[(frame.preset == preset) & (frame.learning_rate == rate)] for preset, rate in best.items()}
    if target is None:
        finals = [rows["validation"].mean() for rows in chosen.values() if not rows["diverged"].any()]
        target = (min(finals) if greater else max(finals)) if finals else None
    rows = []
    for preset in dict.fromkeys(frame["preset"]):
        runs = chosen[preset]
        reached = [
            steps_to(target, history, metric, greater) if target is not None else None for history in runs.history
        ]
        steps = pd.Series([step for step in reached if step is not None], dtype=float)
        rows.append(
            {
                "preset": preset,
                "learning_rate": best[preset],
                "seeds": len(runs),
                "diverged": int(runs["diverged"].sum()),
                "diverged_anywhere": int(frame[frame.preset == preset]["diverged"].sum()),
                "runs": int((frame.preset == preset).sum()),
                **{
                    f"{name}{end}": value
                    for name in ("validation", "test")
                    for end, value in _spread(runs[name]).items()
                },
                "reached": len(steps),
                **{f"steps_to_target{end}": value for end, value in _spread(steps).items()},
                "seconds_per_step": runs["seconds_per_step"].mean(),
                "gradients_per_step": runs["gradients_per_step"].mean(),
            }
        )
    return pd.DataFrame(rows), best, target


def _spread(values: pd.Series) -> dict[str, float]:
    return {"": values.mean(skipna=False), "_std": values.std(ddof=1)}


def table_rows(table: pd.DataFrame) -> list[list[str]]:
    """The table as words, in the order of COLUMNS."""
    return [
        [
            row["preset"],
            f"{row['learning_rate']:g}",
            "diverged" if row["diverged"] else plus_minus(row["validation"], row["validation_std"], ".2f"),
            "diverged" if row["diverged"] else plus_minus(row["test"], row["test_std"], ".2f"),
            plus_minus(row["steps_to_target"], row["steps_to_target_std"], ".0f")
            + (f" ({row['reached']}/{row['seeds']} seeds)" if 0 < row["reached"] < row["seeds"] else ""),
            f"{row['seconds_per_step']:.3f}",
            f"{row['gradients_per_step']:.2f}",
            f"{row['diverged_anywhere']}/{row['runs']} runs",
        ]
        for _, row in table.iterrows()
    ]


def plus_minus(mean: float, deviation: float | None, form: str) -> str:
    """`mean ± deviation`; a sign that `form` asks for is the mean's alone. NaN is a dash, or no deviation."""
    if pd.isna(mean):
        return "–"
    return format(mean, form) + ("" if pd.isna(deviation) else f" ± {deviation:{form.removeprefix('+')}}")


def explanation(frame: pd.DataFrame, target: float | None) -> str:
    """The sentence under the table: what its numbers are."""
    better = "higher" if frame["greater_is_better"].iloc[0] else "lower"
    sentence = (
        f"{frame['metric'].iloc[0]} after {frame['steps'].max()} steps ({better} is better), mean ± standard deviation "
        f"over {frame['seed'].nunique()} seeds, each preset at its best learning rate by validation, of "
        f"{frame['learning_rate'].nunique()}"
    )
    return sentence + (f"; target: {target:.4g} on validation." if target is not None else ".")
