"""Figures of a study, at the width of a README."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hf_extrap.figures import COLOURS, MARKERS, across_seeds, finish, series, spoken
from hf_extrap.study.plan import Plan
from hf_extrap.study.results import Entry, Results, scaling_start, worker_words
from hf_extrap.study.statistics import Estimate

WIDTH = 8.4
"""Inches: at 100 dots each, the width of a README's column."""

ALONG = (
    ("extrap/gradient_noise_scale", "Gradient noise scale"),
    ("extrap/sharpness", "Sharpness: largest Hessian eigenvalue"),
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
        ("learning_rates.png", _learning_rates),
        ("sensitivity.png", _sensitivity),
        ("along_training.png", _along_training),
    ):
        made: tuple[Figure, str] | None = make(plan, results)
        # A figure of an earlier report would tell of other rows.
        (folder / name).unlink(missing_ok=True)
        if made is not None:
            made[0].savefig(folder / name, dpi=130)
            drawn.append((name, made[1]))
    return drawn


def _methods(plan: Plan) -> list[str]:
    return list(plan.study.methods)


def _style(plan: Plan, method: str) -> dict[str, Any]:
    cycle, index = divmod(_methods(plan).index(method), len(COLOURS))
    marker = MARKERS[(index + cycle) % len(MARKERS)]
    return {"color": COLOURS[index], "marker": marker, "linestyle": ("-", "--", ":")[cycle % 3], "label": method}


def _panels(count: int, height: float = 3.3, columns: int = 3) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.4), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend above the panels, where it can cover no curve."""
    found: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(str(label), handle)
    if found:
        handles, labels = list(found.values()), list(found)
        figure.legend(handles, labels, loc="outside upper center", ncols=_legend_columns(labels), frameon=False)


def _legend_columns(labels: Sequence[str]) -> int:
    """How many columns of a legend, filled one after the other, fit beside each other: at most five."""
    for count in range(min(5, len(labels)), 1, -1):
        base, longer = divmod(len(labels), count)
        starts = [column * base + min(column, longer) for column in range(count + 1)]
        longest = [max(map(len, labels[start:end])) for start, end in zip(starts, starts[1:], strict=False)]
        # Inches of a letter, and of a handle with the space around it.
        if sum(0.073 * letters + 0.75 for letters in longest) <= WIDTH:
            return count
    return 1


def _over_batches(axes: Axes, plan: Plan, results: Results, value: Callable[[Entry], Estimate | None]) -> list[float]:
    """Draw means with the seeds' standard deviation over the batch size, a line a method; the batch sizes drawn."""
    drawn: set[float] = set()
    for method in _methods(plan):
        points = [
            (entry.batch_size, found.mean, found.std or 0.0)
            for entry in results.entries
            if entry.method == method and entry.batch_size is not None and (found := value(entry)) is not None
        ]
        if points:
            batches, means, deviations = zip(*sorted(points), strict=True)
            # A spread as long as its mean has no lower end on a logarithmic axis.
            spread = [[min(d, 0.9 * abs(m)) for m, d in zip(means, deviations, strict=True)], deviations]
            axes.errorbar(batches, means, spread, capsize=3, markersize=5, linewidth=1.3, **_style(plan, method))
            drawn.update(batches)
    return sorted(drawn)


def _batch_axis(axes: Axes, batches: Sequence[float]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,.0f}" for batch in batches])
    axes.set_xticks([], minor=True)
    if len(batches) == 1:
        axes.set_xlim(batches[0] / 2, batches[0] * 2)
    axes.set_xlabel("batch size", fontsize=9)


def _metric_axis(axes: Axes, results: Results) -> None:
    """A logarithmic axis for a perplexity that spans enough of it to be read there."""
    low, high = axes.dataLim.intervaly
    if results.metric == "perplexity" and low > 0 and high > 4 * low:
        _log_values(axes)


def _log_values(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _batch_sizes(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    figure, (axes,) = _panels(1, height=3.6)
    batches = _over_batches(axes, plan, results, lambda entry: entry.test)
    if not batches:
        return None
    reference = plan.study.reference
    mark = results.entry(reference.method, reference.workers) if reference else None
    if mark is not None and mark.test is not None:
        axes.axhline(mark.test.mean, color="0.5", linestyle=":", linewidth=1, label="small-batch reference")
    _batch_axis(axes, batches)
    axes.set_ylabel(f"{results.split} {spoken(results.metric)}", fontsize=9)
    _metric_axis(axes, results)
    _legend(figure, [axes])
    return figure, f"{results.split.capitalize()} {spoken(results.metric)} against batch size: mean ± std over seeds."


def _differences(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    """Each method's paired difference to the baseline, a line a method, a panel a batch size."""
    found: dict[int, dict[str, Estimate]] = {}
    for entry in results.entries:
        if entry.difference is not None:
            found.setdefault(entry.workers, {})[entry.method] = entry.difference
    if not found:
        return None
    methods = [method for method in _methods(plan) if any(method in panel for panel in found.values())]
    columns = min(len(found), 4)
    figure, panels = _panels(len(found), height=0.24 * len(methods) + 0.9, columns=columns)
    for index, (axes, (workers, panel)) in enumerate(zip(panels, found.items(), strict=True)):
        for method, difference in panel.items():
            style = _style(plan, method) | {"linestyle": "none"}
            low = difference.mean if difference.low is None else difference.low
            high = difference.mean if difference.high is None else difference.high
            spread = [[difference.mean - low], [high - difference.mean]]
            axes.errorbar([difference.mean], [methods.index(method)], xerr=spread, capsize=3, markersize=5, **style)
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
        f"mean and 95 % interval; {better} of the line is better."
    )


def _scaling(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    figure, panels = _panels(3)
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
        _log_values(axes)
        axes.set_title({"gradients": "Gradients per worker"}.get(name, name.capitalize()), fontsize=10, loc="left")
    if not drawn:
        return None
    limits = [axes.get_ylim() for axes in panels[:2]]
    for axes in panels[:2]:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    _legend(figure, panels)
    return figure, (
        f"Steps, gradients per worker (a fresh direction pays twice) and seconds to validation "
        f"{spoken(results.target_metric or '')} {results.target:.4g}, where every seed reached it."
    )


def _curves(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    largest = plan.study.batches[-1].workers
    figure, (axes,) = _panels(1, height=3.6)
    drawn = False
    for entry in results.entries:
        if entry.workers == largest and entry.histories:
            lines = [series(rows, f"eval_{results.metric}") for rows in entry.histories]
            steps, low, mean, high = across_seeds(lines)
            if len(steps) > 1:
                style = _style(plan, entry.method)
                axes.plot(steps, mean, linewidth=1.5, markersize=4, **style)
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
                drawn = True
    if not drawn:
        return None
    if results.target is not None and results.target_metric == results.metric:
        axes.axhline(results.target, color="0.5", linestyle=":", linewidth=1, label="target")
    finish(axes, logarithmic=False)
    _metric_axis(axes, results)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(f"validation {spoken(results.metric)}", fontsize=9)
    _legend(figure, [axes])
    return (
        figure,
        f"Learning curves with {worker_words(largest)}: mean and range of the seeds, each method at its best.",
    )


def _learning_rates(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    """Validation against the learning rate, at the best of the other searched fields."""
    batches = [batch.workers for batch in plan.study.batches]
    figure, panels = _panels(len(batches))
    drawn = False
    for axes, workers in zip(panels, batches, strict=True):
        rates: set[float] = set()
        for entry in results.entries:
            found: dict[float, float] = {}
            for point, score in entry.trials if entry.workers == workers else []:
                if "learning_rate" in point and math.isfinite(score):
                    rate = float(point["learning_rate"])
                    better = max if results.greater_is_better else min
                    found[rate] = better(score, found.get(rate, score))
            if len(found) > 1:
                axes.plot(
                    *zip(*sorted(found.items()), strict=True), linewidth=1.3, markersize=5, **_style(plan, entry.method)
                )
                rates |= set(found)
        drawn |= bool(rates)
        axes.set_visible(bool(rates))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=9)
        axes.set_xscale("log")
        ticks = _apart(sorted(rates))
        axes.set_xticks(ticks, [_tick(rate) for rate in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("learning rate", fontsize=9)
        axes.set_title(worker_words(workers), fontsize=10, loc="left")
        _metric_axis(axes, results)
    if not drawn:
        return None
    panels[0].set_ylabel(f"validation {spoken(results.metric)}", fontsize=9)
    _legend(figure, panels)
    return (
        figure,
        "Tuning: validation against the learning rate, at the best of the other fields; diverged trials are left out.",
    )


def _apart(values: Sequence[float]) -> list[float]:
    """Those of growing values whose labels do not touch on a logarithmic axis: none within a quarter of its length."""
    kept: list[float] = []
    for value in values:
        if not kept or math.log(value / kept[-1]) > math.log(values[-1] / values[0]) / 4:
            kept.append(value)
    return kept


def _sensitivity(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    """Heat maps over the first two searched fields, a method a row, a batch size a column."""
    maps: dict[str, list[tuple[int, dict[str, list[Any]], Entry]]] = {}
    for method in _methods(plan) if plan.study.search.kind == "grid" else []:
        for count in plan.study.workers_of(method):
            values = plan.study.values(method, count)
            lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) > 1}
            entry = results.entry(method, count)
            if len(lists) >= 2 and entry is not None and entry.trials:
                maps.setdefault(method, []).append((count, dict(list(lists.items())[:2]), entry))
    if not maps:
        return None
    shown = {count for found in maps.values() for count, _, _ in found}
    workers = [batch.workers for batch in plan.study.batches if batch.workers in shown]
    if len(workers) == 1:
        # One batch size: the methods side by side.
        figure, panels = _panels(len(maps), height=1.9)
        for axes, (method, ((_, lists, entry),)) in zip(panels, maps.items(), strict=True):
            _heat_map(axes, lists, entry, results)
            axes.set_title(method, fontsize=9, loc="left")
        return figure, _sensitivity_caption(results, f" with {worker_words(workers[0])}")
    figure, panels = _panels(len(maps) * len(workers), height=1.9, columns=len(workers))
    for axes in panels:
        axes.set_visible(False)
    for row, (method, found) in enumerate(maps.items()):
        for count, lists, entry in found:
            axes = panels[row * len(workers) + workers.index(count)]
            axes.set_visible(True)
            _heat_map(axes, lists, entry, results)
            axes.set_title(f"{method}, {worker_words(count)}", fontsize=9, loc="left")
    return figure, _sensitivity_caption(results)


def _sensitivity_caption(results: Results, where: str = "") -> str:
    return f"Tuning: validation {spoken(results.metric)} over the searched fields{where}; × diverged. Darker is better."


def _heat_map(axes: Axes, lists: dict[str, list[Any]], entry: Entry, results: Results) -> None:
    (across, columns), (down, rows) = lists.items()
    table = np.full((len(rows), len(columns)), np.nan)
    better = np.fmax if results.greater_is_better else np.fmin
    diverged = np.zeros(table.shape, bool)
    for point, score in entry.trials:
        at = rows.index(point[down]), columns.index(point[across])
        if math.isfinite(score):
            table[at] = better(table[at], score)
        else:
            diverged[at] = True
    shown = -table if results.greater_is_better else table
    finite = shown[np.isfinite(shown)]
    # Where one corner is beyond use, the rest must still tell apart.
    top = float(np.quantile(finite, 0.8)) if finite.size else 1.0
    axes.imshow(
        shown, cmap="cividis", aspect="auto", vmax=max(top, float(finite.min()) + 1e-12) if finite.size else 1.0
    )
    for (row, column), value in np.ndenumerate(table):
        word = f"{value:.3g}" if math.isfinite(value) else "×" if diverged[row, column] else ""
        dark = math.isfinite(value) and shown[row, column] <= (top + float(finite.min())) / 2
        axes.text(column, row, word, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), [_tick(value) for value in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), [_tick(value) for value in rows], fontsize=8)
    axes.set_xlabel(across.removeprefix("extrap_").replace("_", " "), fontsize=9)
    axes.set_ylabel(down.removeprefix("extrap_").replace("_", " "), fontsize=9)


def _tick(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def _along_training(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    largest = plan.study.batches[-1].workers
    entries = [entry for entry in results.entries if entry.workers == largest and entry.histories]
    found = []
    for key, title in ALONG:
        lines = {}
        for entry in entries:
            steps, low, mean, high = across_seeds([_either(rows, key) for rows in entry.histories])
            if len(steps) > 1 and any(mean):
                lines[entry.method] = (steps, low, mean, high)
        if lines:
            found.append((title, lines))
    if not found:
        return None
    figure, panels = _panels(len(found), height=2.9, columns=2)
    for axes, (title, lines) in zip(panels, found, strict=True):
        for method, (steps, low, mean, high) in lines.items():
            style = _style(plan, method) | ({"marker": None} if len(steps) > 25 else {})
            axes.plot(steps, mean, linewidth=1.5, markersize=4, **style)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        positive = all(value > 0 for line in lines.values() for value in line[1])
        finish(axes, logarithmic=positive)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
    _legend(figure, panels)
    return figure, f"Along training with {worker_words(largest)}: mean and range of the seeds."


def _either(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """A series under its key or, logged with an evaluation, under that with `eval_` before it."""
    steps, values = series(rows, key)
    return (steps, values) if steps else series(rows, f"eval_{key}")
