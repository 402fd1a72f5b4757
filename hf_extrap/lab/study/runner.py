"""Run what is left of a study, within a time, and say what is left."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hf_extrap.lab.study.execution import Job, OutOfTime
from hf_extrap.lab.study.folder import StudyFolder
from hf_extrap.lab.study.plan import Cell, Plan, Row
from hf_extrap.lab.study.pool import Done, Pool, Processes, ThisProcess, quiet
from hf_extrap.lab.study.specification import Study, read_study


def study_folder(study: Study, output_dir: str | Path | None) -> StudyFolder:
    """The folder that was asked for, or runs/study-<name>."""
    return StudyFolder(Path(output_dir or Path("runs") / f"study-{study.name}"))


def run_study(
    path: str | Path,
    minutes: float | None = None,
    jobs: int = 1,
    output_dir: str | Path | None = None,
    command: str = "hf-extrap study run",
    console: Console | None = None,
) -> int:
    """Run every run of a study that has no row yet; those that failed are tried again.

    Args:
        path: the study's file.
        minutes: start no run that is not expected to end within this time, and stop at its end; None for no limit.
        jobs: how many processes run at once, each with one thread; 1 runs in this process.
        output_dir: the study's folder; default runs/study-<name>.
        command: what the user typed, for the record.
        console: where to write; default: standard output.

    Returns:
        The exit code: 0; 1 if a run failed; 130 after Ctrl-C.

    Raises:
        ValueError: something in the study cannot be; nothing has run.
        FileNotFoundError: the study or its recipe is missing.
    """
    began = time.time()
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}; allowed: a whole number >= 1.")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes is {minutes:g}; allowed: a number > 0.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a study runs in one process for each run; launch it without torchrun and accelerate.")
    study = read_study(path)
    plan = Plan(study)
    plan.check()
    folder = study_folder(study, output_dir)
    lock = folder.lock()
    quiet()
    deadline = None if minutes is None else began + 60 * minutes
    runner = _Runner(plan, folder, command, console or Console(), deadline)
    pool: Pool = ThisProcess() if jobs == 1 else Processes(jobs)
    try:
        return runner.run(pool, jobs)
    finally:
        pool.stop()
        lock.release()


class _Runner:
    def __init__(self, plan: Plan, folder: StudyFolder, command: str, console: Console, deadline: float | None) -> None:
        self.plan, self.folder, self.command, self.deadline = plan, folder, command, deadline
        rows = folder.read()
        self.rows = {key: row for key, row in rows.items() if row["status"] != "failed"}
        self.failed = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self.console = console

    def run(self, pool: Pool, jobs: int) -> int:
        code = 0
        with self.progress:
            bar = self.progress.add_task(self.plan.study.name, total=self.plan.size, left="")
            try:
                while True:
                    self._fill(pool)
                    left = self.plan.left(self.rows)
                    self.progress.update(bar, completed=self.plan.size - left, left=self._time_left(jobs))
                    if not pool.jobs:
                        break
                    for done in pool.collect(self.deadline):
                        self._keep(done)
            except OutOfTime:
                pass
            except KeyboardInterrupt:
                code = 130
        self.console.print(self._summary(jobs), soft_wrap=True, highlight=False)
        return code or (1 if self.failed else 0)

    def _fill(self, pool: Pool) -> None:
        while pool.is_free:
            taken = {job.cell.fingerprint for job in pool.jobs}
            cell = next((cell for cell in self.plan.ready(self.rows) if self._may_start(cell, taken)), None)
            if cell is None:
                return
            pool.submit(self._job(cell))

    def _job(self, cell: Cell) -> Job:
        study = self.plan.study
        return Job(cell, study.name, study.config, self.folder.run_folder(cell.fingerprint).path, self.command)

    def _may_start(self, cell: Cell, taken: set[str]) -> bool:
        if cell.fingerprint in taken:
            return False
        if self.deadline is None:
            return True
        return time.time() + (expected_seconds(cell, list(self.rows.values())) or 0.0) <= self.deadline

    def _keep(self, done: Done) -> None:
        job, row, history = done
        self.folder.append(row, history)
        self.rows[job.cell.fingerprint] = row
        self.failed += row["status"] == "failed"
        number = self.plan.size - self.plan.left(self.rows)
        line = f"[{number}/{self.plan.size}] {job.cell.label}: {outcome(row)} ({row['wall_clock_seconds']:.0f} s)"
        self.progress.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _time_left(self, jobs: int) -> str:
        seconds = self._seconds_left(jobs)
        return "" if seconds is None else f"about {_spoken(seconds)} left"

    def _seconds_left(self, jobs: int) -> float | None:
        rows = list(self.rows.values())
        ready = self.plan.ready(self.rows)
        expected = [expected_seconds(cell, rows) for cell in ready]
        known = [seconds for seconds in expected if seconds is not None]
        if not known:
            return None
        return sum(known) / len(known) * self.plan.left(self.rows) / jobs

    def _summary(self, jobs: int) -> str:
        left = self.plan.left(self.rows)
        hopeless = [
            f"{c.method} × {c.workers}" for c in self.plan.chains if c.is_tuned(self.rows) and not c.best(self.rows)
        ]
        words = [f"{self.plan.size - left} of {self.plan.size} runs are done in {self.folder.path}"]
        if left:
            seconds = self._seconds_left(jobs)
            words.append(f"{left} are left" + (f", about {_spoken(seconds)}" if seconds is not None else ""))
        if self.failed:
            words.append(f"{self.failed} failed, see `message` in rows.jsonl; the next call tries them again")
        if hopeless:
            words.append(f"no trial of {', '.join(hopeless)} trained, so none is reported")
        return "; ".join(words) + "."


def expected_seconds(cell: Cell, rows: Sequence[Row]) -> float | None:
    """The mean time of like runs: same method and batch size, or else same batch size, or else any; None without."""
    finished = [row for row in rows if row["status"] == "finished"] or [r for r in rows if r["status"] == "diverged"]
    same_batch = [row for row in finished if row["workers"] == cell.workers]
    same_method = [row for row in same_batch if row["method"] == cell.method]
    times = [row["wall_clock_seconds"] for row in same_method or same_batch or finished]
    return sum(times) / len(times) if times else None


def outcome(row: Row) -> str:
    """What came out of a run, in a few words."""
    if row["status"] == "failed":
        return f"failed, {row['message']}"
    if row["status"] == "diverged":
        return "diverged" + (f" at step {row['diverged_at']}" if row["diverged_at"] is not None else "")
    return f"validation {row['metric']} {row['validation'][row['metric']]:.4g}"


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
