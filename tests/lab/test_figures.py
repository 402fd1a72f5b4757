"""Elements of figures: seeds, the legend, and axes fitted to most of the points."""

from __future__ import annotations

import math

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_extrap.lab.figures import across_seeds, add_legend, focus, make_panels, within_fences


def triangles(axes: Axes) -> list[tuple[str, float, float, str]]:
    """Marker, place and colour of each mark at an edge."""
    marks = [line for line in axes.lines if line.get_marker() in ("^", "v")]
    return [(m.get_marker(), float(m.get_xdata()[0]), float(m.get_ydata()[0]), m.get_color()) for m in marks]


@pytest.mark.parametrize(
    ("values", "must", "kept"),
    [
        # Quartiles 2 and 4 of 1 … 5: the fences are at -4 and 10.
        ([1, 2, 3, 4, 5], [], (1, 5)),
        ([1, 2, 4, 3, 10], [], (1, 10)),
        ([1, 2, 4, 3, 10.1], [], (1, 4)),
        ([-4.1, 2, 4, 3, 5], [], (2, 5)),
        ([1, 2, 3, 4, 1000], [-7], (-7, 4)),
        # No spread to judge by.
        ([1, 1, 1, 1, 9], [], (1, 9)),
        ([7], [], (7, 7)),
    ],
)
def test_what_is_not_far_out(values: list[float], must: list[float], kept: tuple[float, float]) -> None:
    assert within_fences(values, must) == kept


@pytest.mark.parametrize("sign", [1, -1])
def test_points_far_out_do_not_set_the_axis(sign: int) -> None:
    axes = Figure().subplots()
    points = [(float(x), sign * y, "black") for x, y in enumerate((40.0, 41.0, 42.0, 43.0))]
    assert focus(axes, [*points, (2.0, sign * 9e4, "red")])
    assert axes.get_ylim() == pytest.approx((39.7, 43.3) if sign > 0 else (-43.3, -39.7))
    assert triangles(axes) == [("^", 2.0, 1.0, "red") if sign > 0 else ("v", 2.0, 0.0, "red")]


def test_axes_without_points_far_out_and_means_of_seeds() -> None:
    points = [(float(x), math.exp(x), "black") for x in range(8)]
    linear, logarithmic = Figure().subplots(1, 2)
    assert not focus(logarithmic, points, logarithmic=True)
    assert not triangles(logarithmic)
    # The same points lie far apart as they stand.
    assert focus(linear, points)
    axes = Figure().subplots()
    before = axes.get_ylim()
    assert not focus(axes, [(0.0, 1.0, "black"), (1.0, 2.0, "black")])
    assert axes.get_ylim() == before and axes.get_autoscaley_on()
    seeds = [
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}],
        [{"step": 3, "loss": 3.0}, {"step": 1, "loss": 6.0}, {"step": 2, "loss": 9.0}],
    ]
    assert across_seeds(seeds, "loss").tolist() == [[1, 3], [2, 1], [4, 2], [6, 3]]
    assert across_seeds(seeds, "accuracy").shape == across_seeds([], "loss").shape == (4, 0)
    with pytest.raises(ValueError, match="values is empty"):
        within_fences([])


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        (["sgd"], 1),
        (["adamw", "nadam", "past-update", "sam", "extrap"], 5),
        ([f"{k}: extrap-past preconditioned" for k in range(6)], 2),
        (["x" * 200, "y"], 1),
    ],
)
def test_a_legend_is_as_wide_as_its_labels_allow(labels: list[str], columns: int) -> None:
    figure, panels = make_panels(1)
    for label in labels:
        panels[0].plot([0, 1], label=label)
    add_legend(figure, panels)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns
    assert len(labels[0]) > 100 or legend.get_window_extent().width <= figure.bbox.width
