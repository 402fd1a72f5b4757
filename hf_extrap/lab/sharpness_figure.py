"""The figure of a sharpness measurement: the loss along the gradient and along the sharpest direction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_extrap.recipes.figures import COLOURS


def draw_sharpness(measured: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Draw the loss along both lines, with the parabola that slope and curvature at 0 predict.

    Args:
        measured: the content of sharpness.json.
        path: PNG file to write.
        title: heading of the figure.
    """
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    along_gradient, along_eigenvector = figure.subplots(1, 2)
    norm = measured["gradient_norm"]
    line = measured["lines"]["gradient"]
    rates = np.array(line["learning_rate"])
    parabola = measured["loss"] - norm**2 * (rates - measured["gradient_curvature"] * rates**2 / 2)
    _draw(along_gradient, rates, line["loss"], parabola)
    along_gradient.set_xlabel("learning rate γ of one gradient step, x − γ g", fontsize=9)
    along_gradient.set_ylabel("loss", fontsize=9)
    if norm:
        lengths = along_gradient.secondary_xaxis("top", functions=(lambda rate: rate * norm, lambda t: t / norm))
        lengths.set_xlabel("length of the step, ‖γ g‖", fontsize=9)
        lengths.tick_params(labelsize=9)
    line = measured["lines"]["eigenvector"]
    t = np.array(line["length"])
    parabola = measured["loss"] + measured["eigenvector_slope"] * t + measured["sharpness"] * t**2 / 2
    _draw(along_eigenvector, t, line["loss"], parabola)
    along_eigenvector.set_xlabel("length t of the step along the sharpest direction", fontsize=9)
    handles, labels = along_gradient.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def _draw(axes: Axes, at: np.ndarray, losses: list[float | None], parabola: np.ndarray) -> None:
    # JSON's null, a loss that is not finite, leaves a gap.
    values = np.array(losses, dtype=float)
    axes.plot(at, values, color=COLOURS[0], linewidth=1.5, marker="o", markersize=2.5, label="loss")
    finite = values[np.isfinite(values)]
    if len(finite) and np.ptp(finite):
        margin = 0.1 * float(np.ptp(finite))
        axes.set_ylim(finite.min() - margin, finite.max() + margin)
    axes.plot(at, parabola, color=COLOURS[1], linewidth=1.2, linestyle="--", label="slope and curvature at 0")
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=9)
    axes.ticklabel_format(scilimits=(-3, 4))
