"""Figures of a study, at the width of a README."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_extrap.lab import figures
from hf_extrap.lab.figures import add_legend, finish, make_panels, style_of, use_logarithm
from hf_extrap.lab.study.results import Entry, Results, worker_words
from hf_extrap.lab.study.statistics import Estimate
from hf_extrap.training.figures import spoken

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
    for name, make in FIGURES.items():
        # A figure of an earlier report would show other rows.
        (folder / name).unlink(missing_ok=True)
        if (made := make(results)) is not None:
            made[0].savefig(folder / name, dpi=130)
            drawn[name] = made[1]
    return drawn


def _fit(axes: Axes, results: Results, points: Sequence[figures.Point]) -> bool:
    """Fit the axis of the leading metric to its points, a perplexity's by the logarithm; whether any lies outside."""
    perplexity = results.metric == "perplexity"
    outside = figures.focus(axes, points, logarithmic=perplexity)
    low, high = axes.get_ylim() if outside else axes.dataLim.intervaly
    if perplexity and low > 0 and high > 4 * low:
        use_logarithm(axes.yaxis)
    return outside


def _over_batches(axes: Axes, results: Results, value: Callable[[Entry], Estimate | None]) -> list[figures.Point]:
    """Draw means with the seeds' standard deviation over the batch size, a line a method; the points drawn."""
    drawn: list[figures.Point] = []
    for method in results.study.methods:
        style = style_of(results.study.methods, method)
        entries = [entry for entry in results.entries if entry.method == method and entry.batch_size is not None]
        points = sorted((e.batch_size or 0.0, found.mean, found.std or 0.0) for e in entries if (found := value(e)))
        if points:
            batches, means, deviations = zip(*points, strict=True)
            # A spread as long as its mean has no lower end on a logarithmic axis.
            spread = np.stack([np.minimum(deviations, 0.9 * np.abs(means)), deviations])
            axes.errorbar(batches, means, spread, capsize=3, markersize=5, linewidth=1.3, **style)
            drawn += [(batch, mean, style["color"]) for batch, mean, _ in points]
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
    found = [entry for entry in results.entries if entry.difference is not None]
    if not found:
        return None
    methods = [method for method in results.study.methods if any(entry.method == method for entry in found)]
    batches = list(dict.fromkeys(entry.workers for entry in found))
    columns = min(len(batches), 4)
    figure, panels = make_panels(len(batches), height=0.24 * len(methods) + 0.9, columns=columns)
    beyond = False
    for index, (axes, workers) in enumerate(zip(panels, batches, strict=True)):
        shown = {e.method: e.difference for e in found if e.workers == workers and e.difference}
        least, most = figures.within_fences([difference.mean for difference in shown.values()], must=[0.0])
        ends, outside = [0.0], False
        for method, difference in shown.items():
            style = style_of(results.study.methods, method) | {"linestyle": "none"}
            at, mean = methods.index(method), difference.mean
            if least <= mean <= most:
                low, high = (mean if end is None else end for end in (difference.low, difference.high))
                axes.errorbar([mean], [at], xerr=[[mean - low], [high - mean]], capsize=3, markersize=5, **style)
                ends += [low, high]
            else:
                above, outside = mean > most, True
                edge: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
                axes.plot([float(above)], [at], ">" if above else "<", color=style["color"], **edge)
        if outside:
            margin = 0.06 * (max(ends) - min(ends))
            axes.set_xlim(min(ends) - margin, max(ends) + margin)
        beyond |= outside
        axes.axvline(0, color="0.5", linestyle=":", linewidth=1)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_yticks(range(len(methods)), methods if index % columns == 0 else [""] * len(methods))
        finish(axes, worker_words(workers), f"minus {results.study.baseline}", grid="x")
    better = "right" if results.greater_is_better else "left"
    return figure, (
        f"{results.split.capitalize()} {spoken(results.metric)} minus that of {results.study.baseline}, paired by "
        f"seed: mean and 95 % interval; {better} of the line is better{BEYOND if beyond else ''}."
    )


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
        use_logarithm(axes.yaxis)
        finish(axes, {"gradients": "Gradients per worker"}.get(name, name.capitalize()), "batch size")
    if not drawn:
        return None
    limits = np.array([axes.get_ylim() for axes in panels[:2]])
    for axes in panels[:2]:
        axes.set_ylim(limits.min(), limits.max())
    add_legend(figure, panels)
    return figure, (
        f"Steps, gradients per worker (a fresh direction pays twice) and seconds to validation "
        f"{spoken(results.target_metric or '')} {results.target:.4g}, where every seed reached it."
    )


def _over_steps(results: Results, key: str, workers: int) -> dict[str, np.ndarray]:
    """What each method with the batch size logged under the key, as `across_seeds` returns it."""
    lines = {}
    for entry in results.entries:
        # Logged with an evaluation, it has `eval_` before it.
        logged = (figures.across_seeds(entry.histories, name) for name in (key, f"eval_{key}"))
        line = max(logged, key=lambda line: line.shape[1])
        if entry.workers == workers and line.shape[1] > 1 and line[2].any():
            lines[entry.method] = line
    return lines


def draw_curves(results: Results) -> Drawn:
    """The leading metric over the steps with the last batch size."""
    workers = results.study.batches[-1].workers
    figure, (axes,) = make_panels(1, height=3.6)
    points: list[figures.Point] = []
    for method, line in _over_steps(results, f"eval_{results.metric}", workers).items():
        points += figures.draw_seeds(axes, line, style_of(results.study.methods, method))
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
    ends = sorted({results.study.batches[0].workers, results.study.batches[-1].workers})
    places = {f"{title}, {worker_words(k)}": _over_steps(results, key, k) for key, title in ALONG.items() for k in ends}
    found = {title: lines for title, lines in places.items() if lines}
    if not found:
        return None
    figure, panels = make_panels(len(found), height=2.9, columns=2)
    for axes, (title, lines) in zip(panels, found.items(), strict=True):
        for method, line in lines.items():
            figures.draw_seeds(axes, line, style_of(results.study.methods, method))
        if all((line[1] > 0).all() for line in lines.values()):
            use_logarithm(axes.yaxis)
        finish(axes, title, "step")
    add_legend(figure, panels)
    return figure, "Along training: mean and range of the seeds, each method at its best."


def draw_learning_rates(results: Results) -> Drawn:
    """Validation against the learning rate, at the best of the other searched fields."""
    batches = [batch.workers for batch in results.study.batches]
    figure, panels = make_panels(len(batches))
    drawn = beyond = False
    for axes, workers in zip(panels, batches, strict=True):
        points: list[figures.Point] = []
        for entry in results.entries:
            # From the worst to the best: of several at one rate the last one is kept.
            trials = sorted(entry.trials, key=lambda trial: trial[1], reverse=not results.greater_is_better)
            finite = [(p["learning_rate"], s) for p, s in trials if "learning_rate" in p and math.isfinite(s)]
            found = {float(rate): score for rate, score in finite}
            if entry.workers == workers and len(found) > 1:
                style = style_of(results.study.methods, entry.method)
                axes.plot(*zip(*sorted(found.items()), strict=True), linewidth=1.3, markersize=5, **style)
                points += [(rate, score, style["color"]) for rate, score in found.items()]
        drawn |= bool(points)
        axes.set_visible(bool(points))
        use_logarithm(axes.xaxis, ticks=5)
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
    # Of several trials at one place the best is shown; a diverged one is infinitely bad.
    table, better = np.full((len(rows), len(columns)), np.nan), np.fmax if results.greater_is_better else np.fmin
    for point, score in entry.trials:
        at = rows.index(point[down]), columns.index(point[across])
        table[at] = better(table[at], score)
    shown = np.where(np.isfinite(table), -table if results.greater_is_better else table, np.nan)
    # One value far from the others must not hide the differences between those.
    best, worst = np.nanquantile(shown if np.isfinite(shown).any() else [0.0, 1.0], [0.0, 0.8])
    worst = max(worst, best + 1e-12)
    axes.imshow(shown, cmap="cividis", aspect="auto", vmin=best, vmax=worst)
    for (row, column), value in np.ndenumerate(table):
        word = "" if math.isnan(value) else f"{value:.3g}" if math.isfinite(value) else "×"
        dark = shown[row, column] <= (best + worst) / 2
        axes.text(column, row, word, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    for axis, (name, values) in zip((axes.xaxis, axes.yaxis), lists.items(), strict=True):
        labels = [f"{value:.3g}" if isinstance(value, int | float) else str(value) for value in values]
        axis.set_ticks(range(len(values)), labels, fontsize=8)
        axis.set_label_text(name.removeprefix("extrap_").replace("_", " "), fontsize=9)


FIGURES: dict[str, Callable[[Results], Drawn]] = {
    "batch_size.png": draw_batch_sizes,
    "differences.png": draw_differences,
    "scaling.png": draw_scaling,
    "curves.png": draw_curves,
    "learning_rates.png": draw_learning_rates,
    "sensitivity.png": draw_sensitivity,
    "along_training.png": draw_along_training,
}
"""The file and the function of each figure."""
