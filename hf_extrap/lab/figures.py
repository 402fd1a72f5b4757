"""Elements of the laboratory's figures: panels, one style for each method, seeds, and axes fitted to most points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from hf_extrap.training.figures import COLOURS, MARKERS, series

WIDTH = 8.4
"""Inches: at 100 dots each, the width of a README's column."""

FENCE = 3.0
"""Interquartile ranges beyond the quartiles where Tukey's outer fences stand: what lies outside is far out."""

Row = Mapping[str, Any]
Point = tuple[float, float, str]
"""Horizontal and vertical coordinate, and colour."""


def style_of(names: Iterable[str], name: str) -> dict[str, Any]:
    """Colour, marker, line style and label of one of the names, the same in every figure."""
    cycle, index = divmod(list(names).index(name), len(COLOURS))
    marker = MARKERS[(index + cycle) % len(MARKERS)]
    return {"color": COLOURS[index], "marker": marker, "linestyle": ("-", "--", ":")[cycle % 3], "label": name}


def make_panels(count: int, height: float = 3.3, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, each `height` inches tall."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.4), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for index, axes in enumerate(grid):
        axes.set_visible(index < count)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, grid[:count]


def finish(axes: Axes, title: str = "", across: str = "", up: str = "", grid: str = "both") -> None:
    """The grid, title and labels of a panel."""
    axes.grid(True, which="major", axis=grid, alpha=0.25, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)


def add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend above the panels, where it can cover no curve."""
    handles = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels)
    if found := {str(label): handle for panel in handles for handle, label in panel}:
        # Inches of a letter, and of a handle with the space around it.
        fitting = int(WIDTH / (0.073 * max(map(len, found)) + 0.75))
        columns = max(1, min(5, len(found), fitting))
        figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=columns, frameon=False)


def across_seeds(histories: Sequence[Sequence[Row]], key: str) -> np.ndarray:
    """Steps at which every history has a number under the key, and its smallest, mean and largest value there.

    Returns:
        Shape (4, steps).
    """
    lines = [pd.Series(dict(zip(*series(rows, key), strict=True)), dtype=float) for rows in histories]
    if not lines:
        return np.empty((4, 0))
    # Where a seed is missing, the mean would jump.
    table = pd.concat(lines, axis=1, join="inner").sort_index()
    return np.array([table.index, table.min(axis=1), table.mean(axis=1), table.max(axis=1)], dtype=float)


def draw_seeds(axes: Axes, line: np.ndarray, style: Mapping[str, Any]) -> list[Point]:
    """Draw the mean of the seeds over the steps, with their range behind it; the points of the mean."""
    steps, low, mean, high = line
    few = {} if len(steps) <= 25 else {"marker": None}
    axes.plot(steps, mean, linewidth=1.5, markersize=4, **{**style, **few})
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return [(step, value, style["color"]) for step, value in zip(steps, mean, strict=True)]


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


def focus(axes: Axes, points: Sequence[Point], logarithmic: bool = False) -> bool:
    """Limit the vertical axis to the points that are not far out, and mark the others by triangles at its edge.

    Args:
        axes: what the points are drawn in.
        points: the points.
        logarithmic: judge by the logarithm, of positive values.

    Returns:
        Whether any point lies outside.
    """
    if not points:
        return False
    scaled = [math.log(height) if logarithmic else height for _, height, _ in points]
    low, high = within_fences(scaled)
    outside = [(point, value > high) for point, value in zip(points, scaled, strict=True) if not low <= value <= high]
    if outside:
        limits = np.array([low, high]) + np.array([-0.1, 0.1]) * (high - low)
        axes.set_ylim(*(np.exp(limits) if logarithmic else limits))
    for (across, _, colour), above in outside:
        # In this transform 0 is the lower edge of the axis and 1 the upper one.
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot([across], [float(above)], "^" if above else "v", color=colour, **place)
    return bool(outside)


def use_logarithm(axis: Axis, ticks: int | None = None) -> None:
    """Give an axis a logarithmic scale, with ticks at 1, 2 and 5 of each decade."""
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=ticks))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_locator(NullLocator())
