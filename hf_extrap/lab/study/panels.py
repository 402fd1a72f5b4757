"""What the figures of a study share: panels, a style a method, and axes fitted to most of the points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from hf_extrap.lab.study.plan import Plan
from hf_extrap.lab.study.results import Results
from hf_extrap.recipes.figures import COLOURS, MARKERS

WIDTH = 8.4
"""Inches: at 100 dots each, the width of a README's column."""

FENCE = 3.0
"""Interquartile ranges beyond the quartiles where Tukey's outer fences stand: what lies outside is far out."""

BEYOND = "triangles at an edge: beyond the axis"


def methods_of(plan: Plan) -> list[str]:
    """The methods, in the order of the study's file."""
    return list(plan.study.methods)


def style_of(plan: Plan, method: str) -> dict[str, Any]:
    """Colour, marker, line and label of a method, the same in every figure."""
    cycle, index = divmod(methods_of(plan).index(method), len(COLOURS))
    marker = MARKERS[(index + cycle) % len(MARKERS)]
    return {"color": COLOURS[index], "marker": marker, "linestyle": ("-", "--", ":")[cycle % 3], "label": method}


def make_panels(count: int, height: float = 3.3, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, each `height` inches tall."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.4), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend above the panels, where it can cover no curve."""
    found: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(str(label), handle)
    if found:
        handles, labels = list(found.values()), list(found)
        figure.legend(handles, labels, loc="outside upper center", ncols=legend_columns(labels), frameon=False)


def legend_columns(labels: Sequence[str]) -> int:
    """How many columns of a legend, filled one after the other, fit beside each other: at most five."""
    for count in range(min(5, len(labels)), 1, -1):
        base, longer = divmod(len(labels), count)
        starts = [column * base + min(column, longer) for column in range(count + 1)]
        longest = [max(map(len, labels[start:end])) for start, end in zip(starts, starts[1:], strict=False)]
        # Inches of a letter, and of a handle with the space around it.
        if sum(0.073 * letters + 0.75 for letters in longest) <= WIDTH:
            return count
    return 1


def within_fences(values: Sequence[float], must: Sequence[float] = ()) -> tuple[float, float]:
    """The range of the values that are not far out, by Tukey's outer fences, widened to hold those of `must`.

    Where half of the values or more are the same, there is no spread to judge by, and all are kept.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("values is empty; allowed: at least one.")
    low, high = np.quantile(values, [0.25, 0.75])
    fence = FENCE * (high - low)
    kept = [value for value in values if fence == 0 or low - fence <= value <= high + fence] + list(must)
    return float(min(kept)), float(max(kept))


def focus(axes: Axes, points: Sequence[tuple[float, float, str]], logarithmic: bool = False) -> bool:
    """Limit the vertical axis to the points that are not far out, and mark the others at its edge.

    Args:
        axes: what the points are drawn in.
        points: across, up and colour of each.
        logarithmic: a point's height counts by its logarithm; all are positive.

    Returns:
        Whether any point lies outside.
    """
    heights = np.array([height for _, height, _ in points])
    scaled = np.log(heights) if logarithmic else heights
    low, high = within_fences(list(scaled))
    outside = [(point, value > high) for point, value in zip(points, scaled, strict=True) if not low <= value <= high]
    if not outside:
        return False
    margin = 0.1 * (high - low)
    limits = np.array([low - margin, high + margin])
    axes.set_ylim(*(np.exp(limits) if logarithmic else limits))
    for (across, _, colour), above in outside:
        # Heights of these are shares of the axis: 0 its foot, 1 its top.
        mark_beyond(axes, across, 1.0 if above else 0.0, "^" if above else "v", colour, axes.get_xaxis_transform())
    return True


def mark_beyond(axes: Axes, across: float, up: float, marker: str, colour: str, transform: Any) -> None:
    """A triangle at the edge of an axis, for a point that lies beyond it."""
    axes.plot([across], [up], marker=marker, color=colour, linestyle="none", clip_on=False, transform=transform)


def frame(axes: Axes) -> None:
    """The frame, grid and ticks of a panel."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=9)


def fit_metric_axis(axes: Axes, results: Results, points: Sequence[tuple[float, float, str]]) -> bool:
    """Fit the axis of the leading metric to its points; logarithmic for a perplexity that spans enough of it.

    Returns:
        Whether any point lies outside.
    """
    perplexity = results.metric == "perplexity"
    outside = focus(axes, points, logarithmic=perplexity) if points else False
    low, high = axes.get_ylim() if outside else axes.dataLim.intervaly
    if perplexity and low > 0 and high > 4 * low:
        log_values(axes)
    return outside


def log_values(axes: Axes) -> None:
    """A logarithmic vertical axis with 1, 2 and 5 of each decade."""
    limits = axes.get_ylim()
    axes.set_yscale("log")
    if not axes.get_autoscaley_on():
        axes.set_ylim(limits)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_locator(NullLocator())


def tick(value: Any) -> str:
    """A value as the label of a tick."""
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)
