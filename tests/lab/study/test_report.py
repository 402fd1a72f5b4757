"""The report of a study: numbers by hand on computed runs, figures, and unfinished studies."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_extrap.lab.study.figures import draw_learning_rates
from hf_extrap.lab.study.report import report_study
from hf_extrap.lab.study.results import Results
from hf_extrap.lab.study.runner import run_study
from hf_extrap.lab.study.statistics import estimate, gap_closed, gradients_per_step, paired_difference, steps_to
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes.run_folder import read_json

from .conftest import ComputedRuns

WriteStudy = Callable[..., Path]


def report(study: Path, code: int | None = None) -> tuple[Results, str]:
    """The report, and what was printed; with an exit code, after a run of the study that ends with it."""
    out, shown = study.parent / "out", io.StringIO()
    if code is not None:
        assert run_study(study, output_dir=out, console=Console(file=io.StringIO())) == code
    found = report_study(study, out, console=Console(file=shown, width=160))
    return found, shown.getvalue()


def test_estimates_differences_and_steps_to_a_target() -> None:
    found = estimate([1.0, 2.0, 6.0])
    assert (found.mean, found.count, found.std) == (3.0, 3, pytest.approx(math.sqrt(7)))
    # Of three values a resample's mean is the smallest one with probability 1/27 > 2.5 %, and the largest likewise.
    assert (found.low, found.high) == (1.0, 6.0)
    wide = estimate([float(value) for value in range(101)])
    # The normal interval of 101 values 0 … 100.
    half = 1.96 * statistics.stdev(range(101)) / math.sqrt(101)
    assert (wide.low, wide.high) == pytest.approx((50 - half, 50 + half), abs=0.3)
    one = estimate([4.0])
    assert (one.mean, one.std, one.low) == (4.0, None, None)
    assert estimate([]) is None and estimate([1.0, math.nan]) is None
    pairs = paired_difference({1: 10.0, 2: 20.0, 3: 99.0}, {1: 11.0, 2: 19.0, 4: 0.0})
    assert (pairs.mean, pairs.count, pairs.std) == (0.0, 2, pytest.approx(math.sqrt(2)))
    rows = [{"step": s, "eval_bleu": v} for s, v in ((5, 10.0), (10, None), (15, 20.0), (20, 15.0))]
    assert steps_to(15, rows, "bleu", greater_is_better=True) == 15
    assert steps_to(10, rows, "bleu", greater_is_better=False) == 5
    assert steps_to(21, rows, "bleu", greater_is_better=True) is None


@pytest.mark.parametrize(
    ("score", "baseline", "reference", "greater", "closed"),
    [
        (90.0, 100.0, 80.0, False, 0.5),
        (105.0, 100.0, 80.0, False, -0.25),
        (91.0, 90.0, 92.0, True, 0.5),
        (70.0, 100.0, 80.0, False, 1.5),
        # The baseline is as good as the reference: there is no gap to close.
        (90.0, 80.0, 80.0, False, None),
        (90.0, 95.0, 92.0, True, None),
    ],
)
def test_the_gap(score: float, baseline: float, reference: float, greater: bool, closed: float | None) -> None:
    assert gap_closed(score, baseline, reference, greater) == closed


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


def test_a_report_by_hand(computed: ComputedRuns, write_study: WriteStudy) -> None:
    study = write_study()
    with pytest.raises(ValueError, match="holds no run of this study yet"):
        report(study)
    results, shown = report(study, 0)
    small, fresh_small, large, fresh = results.entries
    # At rate 1, perplexity on test is 52 + 5 log2 K + the seed, less 4 for `extrap`.
    for entry, mean in ((small, 54.0), (fresh_small, 50.0), (large, 64.0), (fresh, 60.0)):
        assert (entry.point["learning_rate"], entry.test.mean, entry.test.std) == (1.0, mean, 1.0)
        assert (entry.test.low, entry.test.high) == (mean - 1, mean + 1)
    assert (fresh.difference.mean, fresh.difference.std, fresh.difference.low) == (-4.0, 0.0, -4.0)
    # (64 − 60) / (64 − 54); at the small batch there is no gap.
    assert fresh.gap_closed == pytest.approx(0.4)
    assert (fresh_small.gap_closed, large.gap_closed) == (None, None)
    # Validation after 10, 20, 30, 40 steps is 30, 20, 10, 0 above the final 50 + 5 log2 K + seed, and the target 63.5.
    assert small.to_target["steps"].mean == 30 and large.to_target["steps"].mean == 40
    assert fresh_small.to_target["steps"].mean == 30 and fresh.to_target["steps"].mean == 40
    # A fresh direction pays two gradients a step, and twice the time.
    assert (large.to_target["gradients"].mean, fresh.to_target["gradients"].mean) == (40, 80)
    assert (large.to_target["seconds"].mean, fresh.to_target["seconds"].mean) == (5.0, 10.0)
    assert (large.relative_seconds, fresh.relative_seconds) == (1.0, 2.0)
    # Four times the batch would take a quarter of 30 steps.
    assert large.scaling == pytest.approx(7.5 / 40) and small.scaling == 1.0
    assert (large.diverged_trials, large.largest_learning_rate) == (1, 10.0)
    assert results.missing == [] and "Not complete" not in shown

    folder = study.parent / "out"
    assert read_json(folder / "summary.json")["largest_batch_within_perfect_scaling"] == {"none": 8.0, "extrap": 8.0}
    entry = read_json(folder / "summary.json")["entries"][3]
    assert (entry["method"], entry["workers"], entry["test"]["mean"], entry["gap_closed"]) == ("extrap", 4, 60.0, 0.4)
    text = (folder / "report.md").read_text()
    settings, difference = "learning_rate 1, step_ratio 0.5", "-4.00 ± 0.00 | -4.00 … -4.00 | 40 %"
    assert f"| extrap | {settings} | 60.00 ± 1.00 | 59.00 … 61.00 | {difference} |" in text
    assert "| none | 40 ± 0 | 40 ± 0 | 5 ± 0 | 19 % | 0.125 | 1.00 | 4/4 | 1 | 10 |" in text
    drawn = {path.name for path in folder.glob("*.png")}
    # No history of these runs tells of the noise or the curvature.
    names = ("batch_size", "differences", "scaling", "curves", "learning_rates", "sensitivity")
    assert drawn == {f"{name}.png" for name in names}
    assert all(f"]({name})" in text and (folder / name).stat().st_size > 10_000 for name in drawn)


def test_a_method_is_reported_at_its_own_batch_sizes(computed: ComputedRuns, write_study: WriteStudy) -> None:
    study = write_study({"methods/extrap/workers": [4]})
    results, shown = report(study, 0)
    assert [(entry.method, entry.workers) for entry in results.entries] == [("none", 1), ("none", 4), ("extrap", 4)]
    assert results.entries[-1].gap_closed == pytest.approx(0.4)
    assert results.missing == [] and "Not complete" not in shown
    small, large = (study.parent / "out/report.md").read_text().split("## ")[1:3]
    assert "| extrap |" not in small and "| extrap |" in large
    assert (study.parent / "out/sensitivity.png").stat().st_size > 10_000


@pytest.mark.matrix
def test_a_target_from_the_small_batch(computed: ComputedRuns, write_study: WriteStudy) -> None:
    source = {"metric": "eval_perplexity", "from": {"method": "none", "workers": 1}}
    study = write_study({"target": source})
    results, _ = report(study, 0)
    # The seeds end at 51, 52 and 53: one of them worse than their mean.
    assert results.target == 52.0
    assert results.entries[0].to_target["steps"].count == 2
    results, _ = report(write_study({"target": {**source, "slack": 0.1}}))
    assert results.target == pytest.approx(57.2)
    assert results.entries[0].to_target["steps"].count == 3
    with pytest.raises(ValueError, match="target.metric is 'bleu'; allowed: (loss, perplexity|perplexity, loss)"):
        report(write_study({"target": {**source, "metric": "bleu"}}))


@pytest.mark.parametrize(
    ("done", "missing"),
    [(1, "none × 1: 1 of 4 trials"), (6, "none × 1: 2 of 3 seeds"), (20, "none × 4: 2 of 3 seeds")],
)
def test_an_unfinished_study(done: int, missing: str, computed: ComputedRuns, write_study: WriteStudy) -> None:
    study = write_study({"target": {"metric": "loss", "from": {"method": "none", "workers": 1}}})
    computed.errors[done] = KeyboardInterrupt()
    results, shown = report(study, 130)
    assert f"Not complete, {28 - done} of 28 runs are left" in shown
    assert results.missing[0] == f"{missing} are done"
    assert ("The target is not known yet" in shown) == (done < 7)


def test_diverged_seeds_are_counted(computed: ComputedRuns, write_study: WriteStudy) -> None:
    changes: dict[str, Any] = {"methods/none/search/learning_rate": [1, 2, 3, 4], "batches": [{"workers": 1}]}
    study = write_study(changes)
    computed.errors[5] = RuntimeError("lost")
    results, shown = report(study, 1)
    assert results.entries[0].test.mean == 54.0
    assert "54.00 ± 1.41 (2/3 seeds, 1 diverged or failed)" in shown
    assert "none × 1: 1 runs failed" in shown


@pytest.mark.matrix
def test_the_sharpness_where_training_ends(computed: ComputedRuns, write_study: WriteStudy) -> None:
    study = write_study()
    folder = study.parent / "out"
    assert "sharpness at the end" not in report(study, 0)[1]
    for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
        if row["stage"] == "final":
            # 10 at first, at the end the seed, and 2 less for `extrap`; the last row has no number.
            last = row["seed"] - 2 * (row["method"] == "extrap")
            history = folder / "histories" / f"{row['fingerprint']}.jsonl"
            values = ((10, 10.0), (20, float(last)), (30, None))
            lines = [json.dumps({"step": step, "extrap/sharpness": value}) for step, value in values]
            history.write_text("\n".join([history.read_text().rstrip("\n"), *lines, ""]))
    results, shown = report(study)
    none, extrap = results.entries[2:]
    assert (none.sharpness.mean, none.sharpness.std, extrap.sharpness.mean) == (2.0, 1.0, 0.0)
    difference = extrap.sharpness_difference
    assert (difference.mean, difference.std, difference.count) == (-2.0, 0.0, 3)
    assert "sharpness at the end" in shown
    text = (folder / "report.md").read_text()
    assert text.count("| extrap | 0.00 ± 1.00 | -1.00 … 1.00 | -2.00 ± 0.00 | -2.00 … -2.00 |") == 2
    assert (folder / "along_training.png").stat().st_size > 10_000


@pytest.mark.matrix
def test_a_rate_that_trains_badly_does_not_flatten_the_figure(computed: ComputedRuns, write_study: WriteStudy) -> None:
    # Perplexities within 1 of each other, but for 50 + 10 * 36 at a rate of a millionth.
    rates = [1e-6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4]
    changes = {"methods/none/search/learning_rate": rates, "methods/extrap/search": {"learning_rate": rates}}
    results, _ = report(write_study({**changes, "search/trials": 8}), 0)
    found = draw_learning_rates(results)
    assert found is not None and "triangles at an edge" in found[1]
    for axes in found[0].axes:
        low, high = axes.get_ylim()
        assert 40 < low < high < 65
        assert sum(line.get_marker() == "^" and line.get_xdata()[0] == 1e-6 for line in axes.lines) == 2
