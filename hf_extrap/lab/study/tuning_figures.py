"""Figures of the tuning of a study: over the learning rate, and over the first two searched fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_extrap.lab.study.panels import (
    BEYOND,
    add_legend,
    fit_metric_axis,
    frame,
    make_panels,
    methods_of,
    style_of,
    tick,
)
from hf_extrap.lab.study.plan import Plan
from hf_extrap.lab.study.results import Entry, Results, worker_words
from hf_extrap.recipes.figures import spoken


def draw_learning_rates(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    """Validation against the learning rate, at the best of the other searched fields."""
    batches = [batch.workers for batch in plan.study.batches]
    figure, panels = make_panels(len(batches))
    drawn = beyond = False
    for axes, workers in zip(panels, batches, strict=True):
        rates: set[float] = set()
        points: list[tuple[float, float, str]] = []
        for entry in results.entries:
            found: dict[float, float] = {}
            for point, score in entry.trials if entry.workers == workers else []:
                if "learning_rate" in point and math.isfinite(score):
                    rate = float(point["learning_rate"])
                    better = max if results.greater_is_better else min
                    found[rate] = better(score, found.get(rate, score))
            if len(found) > 1:
                style = style_of(plan, entry.method)
                axes.plot(*zip(*sorted(found.items()), strict=True), linewidth=1.3, markersize=5, **style)
                rates |= set(found)
                points += [(rate, score, style["color"]) for rate, score in found.items()]
        drawn |= bool(rates)
        axes.set_visible(bool(rates))
        frame(axes)
        axes.set_xscale("log")
        ticks = _apart(sorted(rates))
        axes.set_xticks(ticks, [tick(rate) for rate in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("learning rate", fontsize=9)
        axes.set_title(worker_words(workers), fontsize=10, loc="left")
        beyond |= fit_metric_axis(axes, results, points)
    if not drawn:
        return None
    panels[0].set_ylabel(f"validation {spoken(results.metric)}", fontsize=9)
    add_legend(figure, panels)
    caption = (
        "Tuning: validation against the learning rate, at the best of the other fields; diverged trials are left out"
    )
    return figure, f"{caption}{f'; {BEYOND}' if beyond else ''}."


def _apart(values: Sequence[float]) -> list[float]:
    """Those of growing values whose labels do not touch on a logarithmic axis: none within a quarter of its length."""
    kept: list[float] = []
    for value in values:
        if not kept or math.log(value / kept[-1]) > math.log(values[-1] / values[0]) / 4:
            kept.append(value)
    return kept


def draw_sensitivity(plan: Plan, results: Results) -> tuple[Figure, str] | None:
    """Heat maps over the first two searched fields, a method a row, a batch size a column."""
    maps: dict[str, list[tuple[int, dict[str, list[Any]], Entry]]] = {}
    for method in methods_of(plan) if plan.study.search.kind == "grid" else []:
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
        figure, panels = make_panels(len(maps), height=1.9)
        for axes, (method, ((_, lists, entry),)) in zip(panels, maps.items(), strict=True):
            _heat_map(axes, lists, entry, results)
            axes.set_title(method, fontsize=9, loc="left")
        return figure, _sensitivity_caption(results, f" with {worker_words(workers[0])}")
    figure, panels = make_panels(len(maps) * len(workers), height=1.9, columns=len(workers))
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
    axes.set_xticks(range(len(columns)), [tick(value) for value in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), [tick(value) for value in rows], fontsize=8)
    axes.set_xlabel(across.removeprefix("extrap_").replace("_", " "), fontsize=9)
    axes.set_ylabel(down.removeprefix("extrap_").replace("_", " "), fontsize=9)
