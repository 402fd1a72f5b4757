"""Figures of a study, at the width of a README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_extrap.lab.study.panels import (
    BEYOND,
    add_legend,
    fit_metric_axis,
    frame,
    log_values,
    make_panels,
    mark_beyond,
    methods_of,
    style_of,
    within_fences,
)
from hf_extrap.lab.study.plan import Plan
from hf_extrap.lab.study.results import Entry, Results, scaling_start, worker_words
from hf_extrap.lab.study.statistics import Estimate
from hf_extrap.lab.study.tuning_figures import draw_learning_rates, draw_sensitivity
from hf_extrap.recipes.figures import across_seeds, finish, series, spoken

ALONG = (
    ("extrap/gradient_noise_scale", "Gradient noise scale"),
    ("extrap/sharpness", "Sharpness"),
    ("extrap/preconditioned_sharpness", "Preconditioned sharpness"),
)


def draw(plan: Plan, results: Results, folder: Path) -> list[tuple[str, str]]:
    """Draw every figure that there is data for.

    Returns:
        File name and caption of each.
    """
    drawn = []
    for name, make in (
        ("batch_size.png", _batch_sizes),
        ("differences.png", _differences),
        ("scaling.png", _scaling),
        ("curves.png", _curves),
        ("learning_rates.png", draw_learning_rates),
        ("sensitivity.png", draw_sensitivity),
        ("along_training.png", _along_training),
    ):
        made: tuple[Figure, str] | None = make(plan, results)
        # A figure of an earlier report would tell of other rows.
        (folder / name).unlink(missing_ok=True)
        if made is not None:
            made[0].savefig(folder / name, dpi=130)
            drawn.append((name, made[1]))
    return drawn


def _over_batches(axes: Axes, plan: Plan, results: Results, value: Callable[[Entry], Estimate | None]) -> list[float]:
    """Draw means with the seeds' standard deviation over the batch size, a line a method; the batch sizes drawn."""
    drawn: set[float] = set()
    for method in methods_of(plan):
        points = [
            (entry.batch_size, found.mean, found.std or 0.0)
            for entry in results.entries
            if entry.method == method and entry.batch_size is not None and (found := value(entry)) is not None
        ]
        if points:
            batches, means, deviations = zip(*sorted(points), strict=True)
            # A spread as long as its mean has no lower end on a logarithmic axis.
            spread = [[min(d, 0.9 * abs(m)) for m, d in zip(means, deviations, strict=True)], deviations]
            axes.errorbar(batches, means, spread, capsize=3, markersize=5, linewidth=1.3, **style_of(plan, method))
            drawn.update(batches)
    return sorted(drawn)


def _batch_axis(axes: Axes, batches: Sequence[float]) -> None:
    frame(axes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,.0f}" for batch in batches])
    axes.set_xticks([], minor=True)
    if len(batches) == 1:
        axes.set_xlim(batches[0] / 2, batches[0] * 2)
    axes.set_xlabel("batch size", fontsize=9)


def _batch_sizes(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    figure, (axes,) = make_panels(1, height=3.6)
    batches = _over_batches(axes, plan, results, lambda entry: entry.test)
    if not batches:
        return None
    reference = plan.study.reference
    mark = results.entry(reference.method, reference.workers) if reference else None
    if mark is not None and mark.test is not None:
        axes.axhline(mark.test.mean, color="0.5", linestyle=":", linewidth=1, label="small-batch reference")
    _batch_axis(axes, batches)
    axes.set_ylabel(f"{results.split} {spoken(results.metric)}", fontsize=9)
    points = [
        (entry.batch_size, entry.test.mean, style_of(plan, entry.method)["color"])
        for entry in results.entries
        if entry.batch_size is not None and entry.test is not None
    ]
    beyond = f"; {BEYOND}" if fit_metric_axis(axes, results, points) else ""
    add_legend(figure, [axes])
    what = f"{results.split.capitalize()} {spoken(results.metric)} against batch size"
    return figure, f"{what}: mean ± std over seeds{beyond}."


def _differences(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    """Each method's paired difference to the baseline, a line a method, a panel a batch size."""
    found: dict[int, dict[str, Estimate]] = {}
    for entry in results.entries:
        if entry.difference is not None:
            found.setdefault(entry.workers, {})[entry.method] = entry.difference
    if not found:
        return None
    methods = [method for method in methods_of(plan) if any(method in panel for panel in found.values())]
    columns = min(len(found), 4)
    figure, panels = make_panels(len(found), height=0.24 * len(methods) + 0.9, columns=columns)
    beyond = False
    for index, (axes, (workers, panel)) in enumerate(zip(panels, found.items(), strict=True)):
        beyond |= _draw_differences(axes, plan, methods, panel)
        axes.axvline(0, color="0.5", linestyle=":", linewidth=1)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_yticks(range(len(methods)), methods if index % columns == 0 else [""] * len(methods))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x", alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=9)
        axes.set_title(worker_words(workers), fontsize=10, loc="left")
        axes.set_xlabel(f"minus {plan.study.baseline}", fontsize=9)
    better = "right" if results.greater_is_better else "left"
    return figure, (
        f"{results.split.capitalize()} {spoken(results.metric)} minus that of {plan.study.baseline}, paired by seed: "
        f"mean and 95 % interval; {better} of the line is better{f'; {BEYOND}' if beyond else ''}."
    )


def _draw_differences(axes: Axes, plan: Plan, methods: Sequence[str], panel: dict[str, Estimate]) -> bool:
    """One panel of differences, its axis fitted to those that are not far out; whether any is."""
    means = [difference.mean for difference in panel.values()]
    least, most = within_fences(means, must=[0.0])
    ends = [0.0]
    for method, difference in panel.items():
        style, at = style_of(plan, method) | {"linestyle": "none"}, methods.index(method)
        if not least <= difference.mean <= most:
            above = difference.mean > most
            marker = ">" if above else "<"
            mark_beyond(axes, float(above), at, marker, style["color"], axes.get_yaxis_transform())
            continue
        low = difference.mean if difference.low is None else difference.low
        high = difference.mean if difference.high is None else difference.high
        spread = [[difference.mean - low], [high - difference.mean]]
        axes.errorbar([difference.mean], [at], xerr=spread, capsize=3, markersize=5, **style)
        ends += [low, high]
    if outside := min(means) < least or max(means) > most:
        margin = 0.06 * (max(ends) - min(ends))
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
    return outside


def _scaling(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    figure, panels = make_panels(3)
    drawn: list[float] = []
    for axes, name in zip(panels, ("steps", "gradients", "seconds"), strict=True):

        def value(entry: Entry, name: str = name) -> Estimate | None:
            found = entry.to_target.get(name)
            return found if found is not None and found.count == entry.seeds_planned else None

        batches = _over_batches(axes, plan, results, value)
        drawn += batches
        if not batches:
            continue
        start = scaling_start(results, plan)
        # A second of one step on one device does not shrink with the batch: perfect scaling is of steps.
        if start is not None and name != "seconds" and max(batches) > start[0]:
            line = np.array([start[0], max(batches)])
            axes.plot(
                line, start[0] * start[1] / line, color="0.4", linestyle="--", linewidth=1, label="perfect scaling"
            )
        _batch_axis(axes, batches)
        log_values(axes)
        axes.set_title({"gradients": "Gradients per worker"}.get(name, name.capitalize()), fontsize=10, loc="left")
    if not drawn:
        return None
    limits = [axes.get_ylim() for axes in panels[:2]]
    for axes in panels[:2]:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    add_legend(figure, panels)
    return figure, (
        f"Steps, gradients per worker (a fresh direction pays twice) and seconds to validation "
        f"{spoken(results.target_metric or '')} {results.target:.4g}, where every seed reached it."
    )


def _curves(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    largest = plan.study.batches[-1].workers
    figure, (axes,) = make_panels(1, height=3.6)
    points: list[tuple[float, float, str]] = []
    for entry in results.entries:
        if entry.workers == largest and entry.histories:
            lines = [series(rows, f"eval_{results.metric}") for rows in entry.histories]
            steps, low, mean, high = across_seeds(lines)
            if len(steps) > 1:
                style = style_of(plan, entry.method)
                axes.plot(steps, mean, linewidth=1.5, markersize=4, **style)
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
                points += [(step, value, style["color"]) for step, value in zip(steps, mean, strict=True)]
    if not points:
        return None
    if results.target is not None and results.target_metric == results.metric:
        axes.axhline(results.target, color="0.5", linestyle=":", linewidth=1, label="target")
    finish(axes, logarithmic=False)
    beyond = f"; {BEYOND}" if fit_metric_axis(axes, results, points) else ""
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(f"validation {spoken(results.metric)}", fontsize=9)
    add_legend(figure, [axes])
    return (
        figure,
        f"Learning curves with {worker_words(largest)}: mean and range of the seeds, each method at its best{beyond}.",
    )


def _along_training(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    """The noise scale and the sharpness over the steps, a panel for the smallest and one for the largest batch."""
    ends = sorted({batch.workers for batch in (plan.study.batches[0], plan.study.batches[-1])})
    found = []
    for key, title in ALONG:
        for workers in ends:
            lines = {}
            for entry in results.entries:
                if entry.workers == workers and entry.histories:
                    steps, low, mean, high = across_seeds([_either(rows, key) for rows in entry.histories])
                    if len(steps) > 1 and any(mean):
                        lines[entry.method] = (steps, low, mean, high)
            if lines:
                found.append((f"{title}, {worker_words(workers)}", lines))
    if not found:
        return None
    figure, panels = make_panels(len(found), height=2.9, columns=2)
    for axes, (title, lines) in zip(panels, found, strict=True):
        for method, (steps, low, mean, high) in lines.items():
            style = style_of(plan, method) | ({"marker": None} if len(steps) > 25 else {})
            axes.plot(steps, mean, linewidth=1.5, markersize=4, **style)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        positive = all(value > 0 for line in lines.values() for value in line[1])
        finish(axes, logarithmic=positive)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
    add_legend(figure, panels)
    return figure, "Along training: mean and range of the seeds, each method at its best."


def _either(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """A series under its key or, logged with an evaluation, under that with `eval_` before it."""
    steps, values = series(rows, key)
    return (steps, values) if steps else series(rows, f"eval_{key}")
