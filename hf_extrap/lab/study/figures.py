"""Figures of a study, at the width of a README."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hf_extrap.lab.figures import (
    Point,
    across_seeds,
    add_legend,
    draw_seeds,
    finish,
    focus,
    make_panels,
    mark_beyond,
    style_of,
    use_logarithm,
    within_fences,
)
from hf_extrap.lab.study.results import Entry, Results, worker_words
from hf_extrap.lab.study.statistics import Estimate
from hf_extrap.recipes.figures import spoken

BEYOND = "; triangles at an edge: beyond the axis"

ALONG = {
    "extrap/gradient_noise_scale": "Gradient noise scale",
    "extrap/sharpness": "Sharpness",
    "extrap/preconditioned_sharpness": "Preconditioned sharpness",
}

Drawn = tuple[Figure, str] | None
"""A figure and its caption; None where there is nothing to draw."""


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Draw every figure that there is data for.

    Returns:
        The caption of each file.
    """
    drawn = {}
    figures: dict[str, Callable[[Results], Drawn]] = {
        "batch_size.png": draw_batch_sizes,
        "differences.png": draw_differences,
        "scaling.png": draw_scaling,
        "curves.png": draw_curves,
        "learning_rates.png": draw_learning_rates,
        "sensitivity.png": draw_sensitivity,
        "along_training.png": draw_along_training,
    }
    for name, make in figures.items():
        # A figure of an earlier report would show other rows.
        (folder / name).unlink(missing_ok=True)
        if (made := make(results)) is not None:
            made[0].savefig(folder / name, dpi=130)
            drawn[name] = made[1]
    return drawn


def _style(results: Results, method: str) -> dict[str, Any]:
    return style_of(list(results.study.methods), method)


def _fit(axes: Axes, results: Results, points: Sequence[Point]) -> bool:
    """Fit the axis of the leading metric to its points, a perplexity's by the logarithm; whether any lies outside."""
    perplexity = results.metric == "perplexity"
    outside = focus(axes, points, logarithmic=perplexity)
    low, high = axes.get_ylim() if outside else axes.dataLim.intervaly
    if perplexity and low > 0 and high > 4 * low:
        use_logarithm(axes)
    return outside


def _over_batches(axes: Axes, results: Results, value: Callable[[Entry], Estimate | None]) -> list[Point]:
    """Draw means with the seeds' standard deviation over the batch size, a line a method; the points drawn."""
    drawn: list[Point] = []
    for method in results.study.methods:
        style = _style(results, method)
        points = [
            (entry.batch_size, found.mean, found.std or 0.0)
            for entry in results.entries
            if entry.method == method and entry.batch_size is not None and (found := value(entry)) is not None
        ]
        if points:
            batches, means, deviations = zip(*sorted(points), strict=True)
            # A spread as long as its mean has no lower end on a logarithmic axis.
            spread = [[min(d, 0.9 * abs(m)) for m, d in zip(means, deviations, strict=True)], deviations]
            axes.errorbar(batches, means, spread, capsize=3, markersize=5, linewidth=1.3, **style)
            drawn += [(batch, mean, style["color"]) for batch, mean in zip(batches, means, strict=True)]
    ticks = sorted({batch for batch, _, _ in drawn})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{batch:,.0f}" for batch in ticks])
    axes.set_xticks([], minor=True)
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] / 2, ticks[0] * 2)
    return drawn


def draw_batch_sizes(results: Results) -> Drawn:
    """The reported metric against the batch size."""
    figure, (axes,) = make_panels(1, height=3.6)
    points = _over_batches(axes, results, lambda entry: entry.test)
    if not points:
        return None
    what = f"{results.split} {spoken(results.metric)}"
    reference = results.of(results.study.reference)
    if reference is not None and reference.test is not None:
        axes.axhline(reference.test.mean, color="0.5", linestyle=":", linewidth=1, label="small-batch reference")
    finish(axes, across="batch size", up=what)
    beyond = BEYOND if _fit(axes, results, points) else ""
    add_legend(figure, [axes])
    return figure, f"{what.capitalize()} against batch size: mean ± std over seeds{beyond}."


def draw_differences(results: Results) -> Drawn:
    """The paired difference of each method to the baseline, a line a method, a panel a batch size."""
    found: dict[int, dict[str, Estimate]] = {}
    for entry in results.entries:
        if entry.difference is not None:
            found.setdefault(entry.workers, {})[entry.method] = entry.difference
    if not found:
        return None
    methods = [method for method in results.study.methods if any(method in panel for panel in found.values())]
    columns = min(len(found), 4)
    figure, panels = make_panels(len(found), height=0.24 * len(methods) + 0.9, columns=columns)
    baseline, beyond = results.study.baseline, False
    for index, (axes, (workers, panel)) in enumerate(zip(panels, found.items(), strict=True)):
        beyond |= _draw_differences(axes, results, methods, panel)
        axes.axvline(0, color="0.5", linestyle=":", linewidth=1)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_yticks(range(len(methods)), methods if index % columns == 0 else [""] * len(methods))
        finish(axes, worker_words(workers), f"minus {baseline}", grid="x")
    better = "right" if results.greater_is_better else "left"
    return figure, (
        f"{results.split.capitalize()} {spoken(results.metric)} minus that of {baseline}, paired by seed: "
        f"mean and 95 % interval; {better} of the line is better{BEYOND if beyond else ''}."
    )


def _draw_differences(axes: Axes, results: Results, methods: Sequence[str], panel: dict[str, Estimate]) -> bool:
    """One panel of differences, its axis fitted to those that are not far out; whether any is."""
    least, most = within_fences([difference.mean for difference in panel.values()], must=[0.0])
    ends, outside = [0.0], False
    for method, difference in panel.items():
        style, at, mean = _style(results, method) | {"linestyle": "none"}, methods.index(method), difference.mean
        if least <= mean <= most:
            low = mean if difference.low is None else difference.low
            high = mean if difference.high is None else difference.high
            axes.errorbar([mean], [at], xerr=[[mean - low], [high - mean]], capsize=3, markersize=5, **style)
            ends += [low, high]
        else:
            above, outside = mean > most, True
            mark_beyond(axes, float(above), at, ">" if above else "<", style["color"], axes.get_yaxis_transform())
    if outside:
        margin = 0.06 * (max(ends) - min(ends))
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
    return outside


def draw_scaling(results: Results) -> Drawn:
    """Steps, gradients and seconds to the target against the batch size, beside perfect scaling."""
    figure, panels = make_panels(3)
    start, drawn = results.scaling_start, False
    for axes, name in zip(panels, ("steps", "gradients", "seconds"), strict=True):

        def cost(entry: Entry, name: str = name) -> Estimate | None:
            return entry.to_target[name] if entry.reached_by_all else None

        if not (points := _over_batches(axes, results, cost)):
            continue
        drawn, largest = True, max(batch for batch, _, _ in points)
        # The seconds of a step on one device do not shrink with the batch: perfect scaling is of steps.
        if start is not None and name != "seconds" and largest > start[0]:
            line = np.array([start[0], largest])
            perfect = start[0] * start[1] / line
            axes.plot(line, perfect, color="0.4", linestyle="--", linewidth=1, label="perfect scaling")
        use_logarithm(axes)
        finish(axes, {"gradients": "Gradients per worker"}.get(name, name.capitalize()), "batch size")
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


def draw_curves(results: Results) -> Drawn:
    """The leading metric over the steps with the last batch size."""
    workers = results.study.batches[-1].workers
    figure, (axes,) = make_panels(1, height=3.6)
    points: list[Point] = []
    for entry in results.entries:
        line = across_seeds(entry.histories, f"eval_{results.metric}")
        if entry.workers == workers and line.shape[1] > 1:
            points += draw_seeds(axes, line, _style(results, entry.method))
    if not points:
        return None
    if results.target is not None and results.target_metric == results.metric:
        axes.axhline(results.target, color="0.5", linestyle=":", linewidth=1, label="target")
    finish(axes, across="step", up=f"validation {spoken(results.metric)}")
    beyond = BEYOND if _fit(axes, results, points) else ""
    add_legend(figure, [axes])
    return figure, (
        f"Learning curves with {worker_words(workers)}: mean and range of the seeds, each method at its best{beyond}."
    )


def draw_along_training(results: Results) -> Drawn:
    """The noise scale and the sharpness over the steps, a panel for the smallest and one for the largest batch."""
    found = {}
    for key, title in ALONG.items():
        for workers in sorted({results.study.batches[0].workers, results.study.batches[-1].workers}):
            lines = {}
            for entry in results.entries:
                # Logged with an evaluation, it has `eval_` before it.
                logged = [across_seeds(entry.histories, name) for name in (key, f"eval_{key}")]
                line = max(logged, key=lambda line: line.shape[1])
                if entry.workers == workers and line.shape[1] > 1 and line[2].any():
                    lines[entry.method] = line
            if lines:
                found[f"{title}, {worker_words(workers)}"] = lines
    if not found:
        return None
    figure, panels = make_panels(len(found), height=2.9, columns=2)
    for axes, (title, lines) in zip(panels, found.items(), strict=True):
        for method, line in lines.items():
            draw_seeds(axes, line, _style(results, method))
        if all((line[1] > 0).all() for line in lines.values()):
            use_logarithm(axes)
        finish(axes, title, "step")
    add_legend(figure, panels)
    return figure, "Along training: mean and range of the seeds, each method at its best."


def draw_learning_rates(results: Results) -> Drawn:
    """Validation against the learning rate, at the best of the other searched fields."""
    batches = [batch.workers for batch in results.study.batches]
    figure, panels = make_panels(len(batches))
    better = max if results.greater_is_better else min
    drawn = beyond = False
    for axes, workers in zip(panels, batches, strict=True):
        points: list[Point] = []
        for entry in results.entries:
            found: dict[float, float] = {}
            for point, score in entry.trials if entry.workers == workers else []:
                if "learning_rate" in point and math.isfinite(score):
                    rate = float(point["learning_rate"])
                    found[rate] = better(score, found.get(rate, score))
            if len(found) > 1:
                style = _style(results, entry.method)
                axes.plot(*zip(*sorted(found.items()), strict=True), linewidth=1.3, markersize=5, **style)
                points += [(rate, score, style["color"]) for rate, score in found.items()]
        drawn |= bool(points)
        axes.set_visible(bool(points))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        finish(axes, worker_words(workers), "learning rate")
        beyond |= _fit(axes, results, points)
    if not drawn:
        return None
    panels[0].set_ylabel(f"validation {spoken(results.metric)}", fontsize=9)
    add_legend(figure, panels)
    return figure, (
        "Tuning: validation against the learning rate, at the best of the other fields; diverged trials are left out"
        f"{BEYOND if beyond else ''}."
    )


def draw_sensitivity(results: Results) -> Drawn:
    """Heat maps over the first two searched fields, a method a row, a batch size a column."""
    study = results.study
    maps: dict[tuple[str, int], tuple[Entry, dict[str, list[Any]]]] = {}
    for entry in results.entries if study.search.kind == "grid" else []:
        values = study.values(entry.method, entry.workers).items()
        lists = {name: value for name, value in values if isinstance(value, list) and len(value) > 1}
        if len(lists) >= 2 and entry.trials:
            maps[entry.method, entry.workers] = entry, dict(list(lists.items())[:2])
    if not maps:
        return None
    workers = [batch.workers for batch in study.batches if any(batch.workers == count for _, count in maps)]
    places = [(method, count) for method in study.methods if any(method == m for m, _ in maps) for count in workers]
    figure, panels = make_panels(len(places), height=1.9, columns=len(workers) if len(workers) > 1 else 3)
    for axes, place in zip(panels, places, strict=True):
        axes.set_visible(place in maps)
        if place in maps:
            _heat_map(axes, *maps[place], results)
            axes.set_title(f"{place[0]}, {worker_words(place[1])}", fontsize=9, loc="left")
    what = f"validation {spoken(results.metric)} over the searched fields"
    return figure, f"Tuning: {what}; × diverged. Darker is better."


def _heat_map(axes: Axes, entry: Entry, lists: dict[str, list[Any]], results: Results) -> None:
    (across, columns), (down, rows) = lists.items()
    table, diverged = np.full((len(rows), len(columns)), np.nan), np.zeros((len(rows), len(columns)), bool)
    better = np.fmax if results.greater_is_better else np.fmin
    for point, score in entry.trials:
        at = rows.index(point[down]), columns.index(point[across])
        diverged[at] |= not math.isfinite(score)
        if math.isfinite(score):
            table[at] = better(table[at], score)
    shown = -table if results.greater_is_better else table
    finite = shown[np.isfinite(shown)]
    best = float(finite.min()) if finite.size else 0.0
    # One value far from the others must not hide the differences between those.
    worst = max(float(np.quantile(finite, 0.8)), best + 1e-12) if finite.size else 1.0
    axes.imshow(shown, cmap="cividis", aspect="auto", vmin=best, vmax=worst)
    for (row, column), value in np.ndenumerate(table):
        word = f"{value:.3g}" if math.isfinite(value) else "×" if diverged[row, column] else ""
        dark = shown[row, column] <= (best + worst) / 2
        axes.text(column, row, word, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    for axis, (name, values) in zip((axes.xaxis, axes.yaxis), lists.items(), strict=True):
        labels = [f"{value:.3g}" if isinstance(value, int | float) else str(value) for value in values]
        axis.set_ticks(range(len(values)), labels, fontsize=8)
        axis.set_label_text(name.removeprefix("extrap_").replace("_", " "), fontsize=9)
