"""A comparison: the study that it is, and that it runs, reports and reads finished runs back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_extrap.cli import main
from hf_extrap.lab.compare import comparison
from hf_extrap.lab.study.plan import Plan


def test_learning_rates_are_chosen_by_a_seed_that_is_not_reported(tiny_translation: Path) -> None:
    words = ["--max_steps", "3", "--extrap_virtual_workers=2", "--no_evaluate_untrained"]
    study = comparison(tiny_translation, words, ["none", "extrap:step_ratio=0.25"], [0, 4], [0.1, 0.2], target=7.0)
    assert (study.tune_seeds, study.seeds, study.search.trials) == ([5], [0, 4], 2)
    assert (study.batches[0].workers, study.baseline) == (2, "none")
    assert study.fields == {"max_steps": 3, "evaluate_untrained": False}
    plan = Plan(study)
    plan.check()
    assert plan.size == 2 * (2 + 2)
    cell = plan.ready({})[2]
    assert (cell.method, cell.point, cell.seed) == ("extrap:step_ratio=0.25", {"learning_rate": 0.1}, 5)
    assert {"--extrap=extrap", "--extrap_step_ratio=0.25", "--max_steps=3"} <= set(cell.words)
    # Without a choice to make, only the reported seeds are run.
    plan = Plan(comparison(tiny_translation, [], ["none", "sam"], [0, 1]))
    assert [(cell.stage, cell.seed) for cell in plan.ready({})] == [("final", 0), ("final", 1)] * 2 and plan.size == 4


def test_a_comparison_is_run_twice(tiny_translation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "grid"
    words = ["compare", str(tiny_translation), "--seeds", "0,1", "--output_dir", str(root), "--max_steps", "3"]
    words += ["--presets", "none,extrap-past:step_ratio=0.5"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"[{number}/4]" in shown for number in (1, 2, 3, 4))
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    methods = ["none"] * 2 + ["extrap-past:step_ratio=0.5"] * 2
    assert [(row["method"], row["seed"]) for row in rows] == list(zip(methods, [0, 1, 0, 1], strict=True))
    assert rows[2]["extrap"]["step_ratio"] == 0.5 and all(row["steps"] == 3 for row in rows)
    # Same weights, same first batch, and a past direction that is still empty.
    assert rows[0]["first_loss"] == rows[2]["first_loss"] != rows[1]["first_loss"]
    report = (root / "report.md").read_text()
    assert "| extrap-past:step_ratio=0.5 | " in report and "minus none" in report and "hf-extrap compare" in report
    assert (root / "differences.png").stat().st_size > 5_000

    # What is done is not run again; another preset is added to it.
    words[-1] += ",sam"
    assert main(words) == 0
    assert capsys.readouterr().out.count("/6] final sam") == 2
    assert len((root / "rows.jsonl").read_text().splitlines()) == 6
