"""Draws figures/step.svg: one step of two workers on the contour lines of a loss, computed by `Extrapolated`.

python docs/draw_step.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hf_extrap import ExtrapConfig, Extrapolated

CURVATURE = torch.tensor([[1.0, 0.0], [0.0, 6.0]])
"""A: the Hessian of every worker's loss, f_k(x) = ½ (x − m_k)ᵀ A (x − m_k)."""
MINIMA = torch.tensor([[1.3, 0.36], [-1.3, -0.36]])
"""m_1 and m_2, one for each worker's mini-batch; their mean, the minimum of the mean loss, is 0."""
START = torch.tensor([-2.3, 0.92])
LEARNING_RATE, STEP_SIZE = 0.31, 0.075

BLUE, ORANGE, GRAY = "#1f5fbf", "#d9660a", "#7a7f87"
LEFT, RIGHT, BOTTOM, TOP = -2.75, 0.45, -1.0, 1.1


@dataclass
class Step:
    """One step: x and x_next (2,), y and the gradients at y (workers, 2), and the next x of plain SGD."""

    x: Tensor
    y: Tensor
    gradients: Tensor
    x_next: Tensor
    plain: Tensor


def loss(x: Tensor, minimum: Tensor) -> Tensor:
    """½ (x − m)ᵀ A (x − m), for points of shape (..., 2)."""
    away = x - minimum
    return 0.5 * ((away @ CURVATURE) * away).sum(-1)


def compute() -> Step:
    """Take one step of `extrap` with two virtual workers, each with its fresh gradient as the direction."""
    x = START.clone().requires_grad_()
    config = ExtrapConfig(direction="gradient", scope="local", step_size=STEP_SIZE)
    optimizer = Extrapolated(torch.optim.SGD([x], lr=LEARNING_RATE), config, virtual_workers=2)
    points, gradients = [], []
    for worker, minimum in enumerate(MINIMA):
        with optimizer.probing(worker=worker) as backward:
            backward(loss(x, minimum) / 2)
        optimizer.train(worker=worker)
        points.append(x.detach().clone())
        gradients.append(torch.autograd.grad(loss(x, minimum), x)[0])
        (loss(x, minimum) / 2).backward()
    optimizer.step()
    plain = START - LEARNING_RATE * (START - MINIMA.mean(0)) @ CURVATURE
    return Step(START, torch.stack(points), torch.stack(gradients), x.detach(), plain)


def arrow(axes: Axes, start: Tensor, end: Tensor, color: str, width: float = 2.0, style: str = "-") -> None:
    """An arrow from one point to another."""
    properties = {
        "arrowstyle": "-|>,head_width=0.3,head_length=0.6",
        "color": color,
        "lw": width,
        "linestyle": style,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axes.annotate("", end.tolist(), start.tolist(), arrowprops=properties)


def label(axes: Axes, text: str, point: Tensor, offset: tuple[float, float], color: str, align: str = "left") -> None:
    """A text beside a point, moved by `offset` in points of the page."""
    style = {"ha": align, "va": "center", "size": 15, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5}}
    axes.annotate(text, point.tolist(), offset, textcoords="offset points", color=color, **style)


def draw(path: Path) -> None:
    """Write the figure as SVG (or, by its suffix, PNG) to `path`."""
    step = compute()
    settings = {"svg.hashsalt": "step", "mathtext.fontset": "cm", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.4, 6.2), layout="constrained")
        axes = figure.subplots()
        across, up = torch.meshgrid(torch.linspace(LEFT, RIGHT, 240), torch.linspace(BOTTOM, TOP, 160), indexing="xy")
        heights = loss(torch.stack([across, up], -1), MINIMA.mean(0))
        levels = [0.05, 0.2, 0.5, 1.0, 1.6, 2.4, 3.4, 4.6, 6.0]
        axes.contour(across, up, heights, levels=levels, colors="#cfd6df", linewidths=1)
        axes.plot(0, 0, marker="+", color=GRAY, markersize=13, markeredgewidth=1.6)
        label(axes, "minimum of\nthe mean loss", torch.zeros(2), (0, -24), GRAY, "center")

        arrow(axes, step.x, step.plain, GRAY, 1.6, (0, (5, 3)))
        label(axes, "SGD's step: its gradients\nare taken at $x_t$", step.plain, (10, 4), GRAY)
        arrow(axes, step.x, step.x_next, "black", 2.8)
        places = ((8, 10), "left"), ((-12, 0), "right")
        for worker, color in enumerate((BLUE, ORANGE)):
            y, k, (offset, align) = step.y[worker], worker + 1, places[worker]
            end = y - LEARNING_RATE / 2 * step.gradients[worker]
            arrow(axes, step.x, y, color, 2.4)
            arrow(axes, y, end, color, 2.4, (0, (1.3, 1.1)))
            axes.plot(*y.tolist(), "o", color=color, markersize=9, zorder=5)
            label(axes, f"$y_{k}$", y, offset, color, align)
            label(axes, f"$-\\eta\\,S(d_{k})$", (step.x + y) / 2, offset, color, align)
            label(axes, f"$-\\frac{{\\gamma}}{{2}}\\nabla f_{k}(y_{k})$", (y + 2 * end) / 3, offset, color, align)
        for point in (step.x, step.x_next):
            axes.plot(*point.tolist(), "o", color="black", markersize=11, zorder=6)
        label(axes, "$x_t$", step.x, (-14, 8), "black", "right")
        label(axes, "$x_{t+1} = x_t - \\gamma\\,\\bar{g}$", step.x_next, (14, -2), "black")
        axes.set(xlim=(LEFT, RIGHT), ylim=(BOTTOM, TOP), aspect="equal")
        axes.axis("off")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).parent / "figures" / "step.svg")
