"""Figures of one run; Matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .extras import extra

#: Name of the figure of a run, in its folder.
CURVES_FILE = "curves.png"

# The palette of Okabe and Ito, for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# History key, title, whether the axis is logarithmic.
PANELS: tuple[tuple[str, str, bool], ...] = (
    ("learning_rate", "Learning rate", False),
    ("extrap/step_size", "Extrapolation step size", False),
    ("extrap/displacement_norm", "Displacement ‖x − y‖", False),
    ("extrap/direction_cosine", "Cosine of direction and mean gradient", False),
    ("extrap/gradient_noise_scale", "Gradient noise scale", True),
    ("extrap/sharpness", "Sharpness λ_max, at x", True),
    ("extrap/preconditioned_sharpness", "Sharpness in Adam's metric, at x", True),
)


def spoken(metric: str) -> str:
    """Name of a metric in tables and figures."""
    return {"bleu": "BLEU", "chrf": "chrF", "accuracy": "accuracy (%)"}.get(metric, metric)


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows of a history with a number under `key`."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float) and "step" in row]
    return [step for step, _ in found], [value for _, value in found]


def draw_curves(rows: Sequence[Mapping[str, Any]], metric: str | None, path: Path, title: str = "") -> list[str]:
    """Draw a run's history into a PNG file, one panel for each quantity with at least two values, not all zero.

    `metric` is the key of the leading metric, without `eval_`, if it is not the loss. Returns the titles of the panels;
    without any, no file is written.
    """
    with extra("recipes"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    panels: list[tuple[str, dict[str, tuple[list[float], list[float]]], bool]] = []
    losses = {"training, at y": series(rows, "loss"), "validation, at x": series(rows, "eval_loss")}
    panels.append(("Loss", losses, False))
    if metric not in (None, "loss"):
        validation = {"": series(rows, f"eval_{metric}")}
        panels.append((f"Validation {spoken(metric)}, at x", validation, metric == "perplexity"))
    panels += [(name, {"": series(rows, key)}, logarithmic) for key, name, logarithmic in PANELS]
    panels = [panel for panel in panels if any(len(steps) > 1 and any(y) for steps, y in panel[1].values())]
    if not panels:
        return []
    columns = min(2, len(panels))
    count = -(-len(panels) // columns)
    figure = Figure(figsize=(8.4, 2.5 * count + 0.4), layout="constrained")
    grid = figure.subplots(count, columns, squeeze=False)
    for axes, (name, lines, logarithmic) in zip(grid.flat, panels, strict=False):
        lines = {label: line for label, line in lines.items() if line[0]}
        for index, (label, (steps, values)) in enumerate(lines.items()):
            marker = MARKERS[index] if len(steps) <= 25 else None
            axes.plot(steps, values, color=COLOURS[index], label=label, linewidth=1.5, marker=marker, markersize=3.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="both", alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=9)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if logarithmic and all(value > 0 for _, values in lines.values() for value in values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.yaxis.set_minor_locator(NullLocator())
        if len(lines) > 1:
            above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.1}
            axes.legend(**above, ncols=2, frameon=False, fontsize=8)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return [name for name, _, _ in panels]
