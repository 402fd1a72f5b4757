"""Figures contain the data of their titles."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np

from hf_extrap.training.figures import COLOURS, draw_curves, series

ROWS = [
    *({"step": s, "loss": 5 - s / 10, "learning_rate": 0.1, "extrap/step_size": 0.02} for s in range(1, 11)),
    {"step": 5, "eval_loss": 4.6, "eval_perplexity": 99.5},
    {"step": 8, "eval_loss": 4.4, "eval_perplexity": 81.5},
    {"step": 10, "eval_loss": 4.2, "eval_perplexity": None},
]


def has_colour(path: Path, colour: str, least: int = 20) -> bool:
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(axis=-1) < 8).sum()) >= least


def test_only_panels_with_data_are_drawn(tmp_path: Path) -> None:
    drawn = draw_curves(ROWS, "perplexity", tmp_path / "curves.png", "a title")
    assert drawn == ["Loss", "Validation perplexity, at x", "Learning rate", "Extrapolation step size"]
    assert has_colour(tmp_path / "curves.png", COLOURS[0])
    assert has_colour(tmp_path / "curves.png", COLOURS[1])
    width = matplotlib.image.imread(tmp_path / "curves.png").shape[1]
    assert 1000 <= width <= 1200
    rows = [{**row, "extrap/displacement_norm": 0.0} for row in ROWS]
    assert "Displacement ‖x − y‖" not in draw_curves(rows, "perplexity", tmp_path / "curves.png")
    drawn = draw_curves(ROWS[:11], "perplexity", tmp_path / "curves.png")
    assert drawn == ["Loss", "Learning rate", "Extrapolation step size"]
    assert draw_curves([], "bleu", tmp_path / "none.png") == [] and not (tmp_path / "none.png").exists()
    assert series(ROWS, "eval_perplexity") == ([5, 8], [99.5, 81.5])
    assert series(ROWS, "missing") == ([], [])
