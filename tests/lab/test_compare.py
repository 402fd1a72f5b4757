"""A comparison: its statistics, its grid, what it leaves, and that finished cells are read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hf_extrap.cli import main
from hf_extrap.lab.summary import COLUMNS, gradients_per_step, steps_to, summarise, table_rows
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes.run_folder import RunFolder, read_json


def row(preset: str, rate: float, seed: int, value: float, **others: Any) -> dict[str, Any]:
    history = [{"step": 10, "eval_perplexity": value + 50}, {"step": 20, "eval_perplexity": value}]
    return {
        "preset": preset,
        "learning_rate": rate,
        "seed": seed,
        "metric": "perplexity",
        "greater_is_better": False,
        "validation": value,
        "test": value + 1,
        "seconds_per_step": 0.5,
        "gradients_per_step": 1.0,
        "steps": 20,
        "diverged": not math.isfinite(value),
        "history": history,
        **others,
    }


def test_each_preset_is_judged_at_its_best_learning_rate() -> None:
    frame = pd.DataFrame(
        [
            *(row("none", 1.0, seed, value) for seed, value in enumerate((100.0, 104.0))),
            *(row("none", 2.0, seed, value) for seed, value in enumerate((90.0, float("nan")))),
            *(row("extrap", 1.0, seed, value) for seed, value in enumerate((99.0, 99.0))),
            *(row("extrap", 2.0, seed, value) for seed, value in enumerate((92.0, 96.0))),
        ]
    )
    table, best, target = summarise(frame)
    # A rate at which one seed diverged is not the best one, however good the other seed is.
    assert best == {"none": 1.0, "extrap": 2.0}
    assert target == 102.0
    none, extrap = table.to_dict("records")
    assert (none["validation"], none["test"]) == (102.0, 103.0)
    assert none["validation_std"] == pytest.approx(math.sqrt(8))
    assert extrap["validation"] == 94.0
    assert (none["diverged"], none["diverged_anywhere"], none["runs"]) == (0, 1, 4)
    # Seed 1 of `none` ends at 104 and never reaches the mean of its own preset.
    assert (none["reached"], none["steps_to_target"]) == (1, 20.0)
    assert (extrap["reached"], extrap["steps_to_target"]) == (2, 20.0)
    words = table_rows(table)
    assert words[0][2] == "102.00 ± 2.83" and words[0][4] == "20 (1/2 seeds)"
    assert len(words[0]) == len(COLUMNS)


def test_a_preset_that_diverged_everywhere_is_shown_as_such() -> None:
    frame = pd.DataFrame([row("none", 1.0, 0, 50.0), row("sam", 1.0, 0, float("nan"))])
    table, _, target = summarise(frame)
    assert target == 50.0
    assert table_rows(table)[1][2] == "diverged"
    assert table_rows(table)[0][2] == "50.00"


def test_a_higher_metric_can_be_the_better_one() -> None:
    runs = [row(name, rate, 0, value) for name, rate, value in (("a", 1, 20.0), ("a", 2, 30.0), ("b", 1, 25.0))]
    frame = pd.DataFrame(runs).assign(greater_is_better=True)
    _, best, target = summarise(frame)
    assert (best, target) == ({"a": 2, "b": 1}, 25.0)


def test_steps_to_a_target() -> None:
    rows = [{"step": s, "eval_bleu": v} for s, v in ((5, 10.0), (10, None), (15, 20.0), (20, 15.0))]
    assert steps_to(15, rows, "bleu", greater_is_better=True) == 15
    assert steps_to(10, rows, "bleu", greater_is_better=False) == 5
    assert steps_to(21, rows, "bleu", greater_is_better=True) is None


@pytest.mark.parametrize(
    ("preset", "fields", "expected"),
    [
        ("none", {}, 1.0),
        ("extrap", {}, 2.0),
        ("extrap", {"batch_fraction": 0.25}, 1.25),
        ("extrap", {"end_step": 10}, 1.1),
        ("extrap-past", {}, 1.0),
        ("extrap-past", {"step_size": "auto", "probe_every": 20}, 1.05),
        ("gaussian", {}, 1.0),
    ],
)
def test_gradients_a_step(preset: str, fields: dict[str, Any], expected: float) -> None:
    assert gradients_per_step(ExtrapConfig.preset(preset, **fields), steps=100) == pytest.approx(expected)


def test_a_grid_is_run_written_and_read_back(
    tiny_translation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "grid"
    words = ["compare", str(tiny_translation), "--seeds", "0,1", "--output_dir", str(root), "--max_steps", "3"]
    words += ["--presets", "none,extrap-past:step_ratio=0.5"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"[{number}/4]" in shown for number in (1, 2, 3, 4)) and "trained" in shown

    numbers = read_json(root / "compare.json")
    assert [entry["preset"] for entry in numbers["table"]] == ["none", "extrap-past:step_ratio=0.5"]
    assert [(entry["preset"], entry["seed"]) for entry in numbers["runs"]][:2] == [("none", 0), ("none", 1)]
    assert numbers["table"][0]["seeds"] == 2
    assert (root / "compare.png").stat().st_size > 10_000
    markdown = (root / "compare.md").read_text()
    assert markdown.splitlines()[0].count("|") == len(COLUMNS) + 1 and "hf-extrap compare" in markdown

    folder = RunFolder(root / "extrap-past_step_ratio-0.5/lr-default/seed-1")
    assert folder.read_metrics()["extrap"]["step_ratio"] == 0.5
    losses = {
        name: RunFolder(root / name / "lr-default/seed-0").read_history()[0]["loss"]
        for name in ("none", "extrap-past_step_ratio-0.5")
    }
    # Same weights, same first batch, and a past direction that is still empty.
    assert losses["none"] == losses["extrap-past_step_ratio-0.5"]

    written = (folder.path / "metrics.json").stat().st_mtime_ns
    assert main(words) == 0
    assert capsys.readouterr().out.count("read back") == 4
    assert (folder.path / "metrics.json").stat().st_mtime_ns == written

    assert main([*words, "--label_smoothing_factor", "0.3"]) == 2
    assert "holds another run: its label_smoothing_factor is 0.1, not 0.3" in capsys.readouterr().err
