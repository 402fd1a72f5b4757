"""The runner of a study: what runs, in which order, what is kept, interrupts and failures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_extrap.lab.study import execution, runner
from hf_extrap.lab.study.execution import OutOfTime
from hf_extrap.lab.study.folder import StudyFolder
from hf_extrap.lab.study.plan import Cell
from hf_extrap.lab.study.pool import ThisProcess
from hf_extrap.lab.study.runner import expected_seconds, run_study

from .conftest import ComputedRuns

WriteStudy = Callable[..., Path]


def run(study: Path, **options: Any) -> tuple[int, str]:
    """The exit code, and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    return run_study(study, output_dir=study.parent / "out", console=console, **options), console.file.getvalue()


def rows_of(study: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (study.parent / "out/rows.jsonl").read_text().splitlines()]


def test_every_method_is_tuned_and_its_best_point_is_run(computed: ComputedRuns, write_study: WriteStudy) -> None:
    study = write_study()
    code, shown = run(study)
    assert code == 0
    rows = rows_of(study)
    # Two batch sizes, two methods, four trials and three seeds.
    assert len(rows) == len(computed.given) == 28
    assert "28 of 28 runs are done" in shown
    for method in ("none", "extrap"):
        for workers in (1, 4):
            ours = [row for row in rows if (row["method"], row["workers"]) == (method, workers)]
            assert [row["seed"] for row in ours if row["stage"] == "tune"] == [0] * 4
            finals = [row for row in ours if row["stage"] == "final"]
            assert [row["seed"] for row in finals] == [1, 2, 3]
            assert {row["learning_rate"] for row in finals} == {1.0}
    first, diverged = rows[0], rows[3]
    assert (diverged["status"], diverged["diverged_at"], diverged["validation"]) == ("diverged", 7, {})
    assert first["validation"] == {"perplexity": 60.0, "loss": pytest.approx(4.0943446)}
    assert first["test"]["perplexity"] == 62.0
    assert (first["steps"], first["gradients"], first["seconds"], first["batch_size"]) == (40, 40.0, 5.0, 8.0)
    fresh = next(row for row in rows if row["method"] == "extrap")
    assert (fresh["gradients_per_step"], fresh["gradients"], fresh["seconds"]) == (2.0, 80.0, 10.0)
    assert fresh["configuration"]["extrap_step_ratio"] == 0.5 and "output_dir" not in fresh["configuration"]
    assert set(fresh["versions"]) >= {"torch", "transformers", "hf_extrap"}
    # The runs' own folders are gone; their histories are kept.
    assert not list((study.parent / "out/runs").iterdir())
    history = StudyFolder(study.parent / "out").history(first["fingerprint"])
    assert history[0] == {"step": 1, "loss": 5.3} and history[-1] == {"step": 40, "eval_perplexity": 60.0}


def test_every_run_leaves_little_and_stops_early(computed: ComputedRuns, write_study: WriteStudy) -> None:
    batches = [{"workers": 4, "fields": {"max_steps": 30}}]
    run(write_study({"fields": {"weight_decay": 0.5}, "batches": batches, "reference": None}))
    for given in computed.given:
        assert (given["save_model"], given["abort_factor"], given["logging_first_step"]) == (False, 3.0, True)
        assert (given["weight_decay"], given["max_steps"], given["extrap_virtual_workers"]) == (0.5, 30, 4)


def test_a_second_call_runs_only_what_changed(computed: ComputedRuns, write_study: WriteStudy) -> None:
    run(write_study())
    before = (len(computed.given), rows_of(write_study())[0])
    run(write_study())
    assert len(computed.given) == before[0]
    # Another value for one method: its new trials, and no final run, since its best is the same.
    study = write_study({"methods/extrap/search/learning_rate": [1, 5]})
    code, _ = run(study)
    assert code == 0
    new = computed.given[before[0] :]
    assert [(given["extrap"], given["learning_rate"]) for given in new] == [("extrap", 5.0)] * 4
    assert rows_of(study)[0] == before[1] and len(rows_of(study)) == 32


def test_a_method_runs_at_its_own_batch_sizes(computed: ComputedRuns, write_study: WriteStudy) -> None:
    study = write_study({"methods/extrap/workers": [4], "methods/extrap/scale_learning_rate": "sqrt"})
    code, shown = run(study)
    assert code == 0 and "21 of 21 runs are done" in shown
    where = {(row["method"], row["workers"]) for row in rows_of(study)}
    assert where == {("none", 1), ("none", 4), ("extrap", 4)}
    # Rates are still scaled from the first batch of the study.
    rates = {row["learning_rate"] for row in rows_of(study) if row["method"] == "extrap"}
    assert rates == {2.0, 20.0}
    # Given its other batch size too, a method runs there alone.
    code, _ = run(write_study({"methods/extrap/scale_learning_rate": "sqrt"}))
    assert code == 0
    assert {(row["method"], row["workers"]) for row in rows_of(study)[21:]} == {("extrap", 1)}


def test_an_interrupt_or_a_deadline_keeps_what_is_done(computed: ComputedRuns, write_study: WriteStudy) -> None:
    study = write_study()
    # The clock ends the third run, and another call is interrupted after three more.
    computed.errors |= {2: OutOfTime(), 6: KeyboardInterrupt()}
    code, shown = run(study, minutes=60)
    assert code == 0 and "2 of 28 runs are done" in shown and len(rows_of(study)) == 2
    code, shown = run(study)
    assert code == 130 and "5 of 28 runs are done" in shown and "23 are left" in shown
    assert len(list((study.parent / "out/runs").iterdir())) == 1
    # The lock is free, and the run that was interrupted begins again.
    code, _ = run(study)
    assert code == 0 and len(rows_of(study)) == 28 and len(computed.given) == 30
    assert computed.given[6] == computed.given[7]


def test_a_failed_run_is_tried_again(computed: ComputedRuns, write_study: WriteStudy) -> None:
    study = write_study()
    computed.errors[0] = RuntimeError("no memory\nis left")
    code, shown = run(study)
    assert code == 1 and "1 failed" in shown
    failed = rows_of(study)[0]
    assert failed["status"] == "failed" and failed["message"].startswith("RuntimeError: no memory is left (conftest.py")
    assert len(rows_of(study)) == 28
    code, _ = run(study)
    assert code == 0 and len(rows_of(study)) == 29 and rows_of(study)[-1]["status"] == "finished"
    # A method that never trains has no final runs.
    study = write_study({"methods/none/search/learning_rate": [100, 200, 300, 400], "name": "another"})
    (study.parent / "out/rows.jsonl").unlink()
    code, shown = run(study)
    assert code == 0 and len(rows_of(study)) == 22
    assert "no trial of none × 1, none × 4 trained" in shown and "are left" not in shown


def test_a_line_that_was_cut_off_is_written_anew(computed: ComputedRuns, write_study: WriteStudy) -> None:
    study = write_study()
    run(study)
    rows = study.parent / "out/rows.jsonl"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-40])
    assert run(study)[0] == 0
    assert len(computed.given) == 29 and len(rows_of(study)) == 28
    rows.write_bytes(b"{}\n" + whole)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1, is not a row of a study"):
        run(study)


def test_runs_end_in_time(computed: ComputedRuns, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def run_for_seconds(*args: Any, **named: Any) -> dict[str, Any]:
        nonlocal now
        metrics = computed(*args, **named)
        now += 30 if metrics["extrap"]["direction"] == "gradient" else 10
        return metrics

    monkeypatch.setattr(runner.time, "time", lambda: now)
    monkeypatch.setattr(execution.time, "perf_counter", lambda: now)
    monkeypatch.setattr(execution, "run", run_for_seconds)
    study = write_study()
    # 7 runs of `none` with one worker end at 70 s, one of `extrap` at 100 s; `none` with 4 workers fills the rest.
    code, shown = run(study, minutes=2.0)
    assert code == 0 and "are left" in shown
    done = [(row["method"], row["workers"]) for row in rows_of(study)]
    assert done == [("none", 1)] * 7 + [("extrap", 1)] + [("none", 4)] * 2
    assert now == pytest.approx(120)
    assert run(study)[0] == 0 and len(rows_of(study)) == 28


def test_a_killed_process(computed: ComputedRuns, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [BrokenPool(), ThisProcess()]
    monkeypatch.setattr(runner, "start", lambda jobs: pools.pop(0))
    study = write_study()
    code, shown = run(study, jobs=2)
    assert code == 1 and "2 failed" in shown and not pools
    rows = rows_of(study)
    assert [row["status"] for row in rows[:2]] == ["failed"] * 2 and rows[0]["message"].endswith("was killed")
    assert len(rows) == 28 and not any(row["status"] == "failed" for row in rows[2:])


class BrokenPool(ThisProcess):
    """A pool one of whose processes was killed."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenExecutor())
        return future


def test_bad_options_and_a_second_program_are_refused(write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--jobs is 0"):
        run(write_study(), jobs=0)
    with pytest.raises(ValueError, match="--minutes is 0"):
        run(write_study(), minutes=0)
    lock = StudyFolder(write_study().parent / "out").lock()
    with pytest.raises(ValueError, match="is in use by another"):
        run(write_study())
    lock.release()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        run(write_study())

    def row(method: str, workers: int, seconds: float, status: str = "finished") -> dict[str, Any]:
        return {"method": method, "workers": workers, "wall_clock_seconds": seconds, "status": status}

    def cell(method: str, workers: int) -> Cell:
        return Cell("s", "tune", method, workers, 0, {}, 0, "x")

    rows = [row("a", 1, 10), row("a", 1, 20), row("b", 1, 60), row("b", 4, 2, "diverged")]
    assert expected_seconds(cell("a", 1), rows) == 15
    assert expected_seconds(cell("c", 1), rows) == 30
    # A run that diverged takes less time than one that does not.
    assert expected_seconds(cell("b", 4), rows) == 30
    assert expected_seconds(cell("a", 1), []) is None
