"""Run what is left of a study, within a time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hf_extrap.lab.study.execution import OutOfTime, execute
from hf_extrap.lab.study.folder import StudyFolder, study_folder
from hf_extrap.lab.study.plan import Cell, Plan
from hf_extrap.lab.study.pool import quiet, start, stop
from hf_extrap.lab.study.rows import Row
from hf_extrap.lab.study.specification import Study, read_study


def run_study(
    study: str | Path | Study,
    minutes: float | None = None,
    jobs: int = 1,
    output_dir: str | Path | None = None,
    command: str = "hf-extrap study run",
    console: Console | None = None,
) -> int:
    """Run every run of a study that has no row yet; those that failed are tried again.

    Args:
        study: the study, or its file.
        minutes: start no run that is not expected to end within this time, and stop at its end; None for no limit.
        jobs: how many processes run at once, each with one thread; 1 runs in this process.
        output_dir: the study's folder; default runs/study-<name>.
        command: the command line, for the record.
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
    plan = Plan(study if isinstance(study, Study) else read_study(study))
    plan.check()
    folder = study_folder(plan.study, output_dir)
    lock = folder.lock()
    quiet()
    deadline = None if minutes is None else began + 60 * minutes
    runner = _Runner(plan, folder, command, console or Console(), deadline, jobs)
    try:
        return runner.run()
    finally:
        stop(runner.executor)
        lock.release()


class _Runner:
    def __init__(
        self, plan: Plan, folder: StudyFolder, command: str, console: Console, deadline: float | None, jobs: int
    ) -> None:
        self.plan, self.folder, self.command, self.console = plan, folder, command, console
        self.deadline, self.jobs = deadline, jobs
        self.rows = {key: row for key, row in folder.read().items() if row["status"] != "failed"}
        self.failed = 0
        self.executor = start(jobs)
        self.running: dict[Future[Any], Cell] = {}

    def run(self) -> int:
        code = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[left]}"), console=self.console) as progress:
            bar = progress.add_task(self.plan.study.name, total=self.plan.size, left="")
            try:
                while self._submit():
                    left, seconds = self.plan.left(self.rows), self._seconds_left()
                    told = "" if seconds is None else f"about {_spoken(seconds)} left"
                    progress.update(bar, completed=self.plan.size - left, left=told)
                    timeout = None if self.deadline is None else max(0.0, self.deadline - time.time())
                    done, _ = wait(self.running, timeout, FIRST_COMPLETED)
                    if not done:
                        break
                    if any(isinstance(future.exception(), BrokenExecutor) for future in done):
                        # A process was killed from outside, for its memory as a rule: its whole pool ends.
                        done, _ = wait(self.running)
                        self.executor = start(self.jobs)
                    for future in done:
                        self._keep(future, progress.console)
                progress.update(bar, completed=self.plan.size - self.plan.left(self.rows))
            except OutOfTime:
                pass
            except KeyboardInterrupt:
                code = 130
        self.console.print(self._summary(), soft_wrap=True, highlight=False, markup=False)
        return code or (1 if self.failed else 0)

    def _submit(self) -> bool:
        """Start as many runs as there are processes for; whether any is under way."""
        while len(self.running) < self.jobs:
            taken = {cell.fingerprint for cell in self.running.values()}
            ready = [cell for cell in self.plan.ready(self.rows) if cell.fingerprint not in taken]
            # The first one that is expected to end in time.
            rows, now = list(self.rows.values()), time.time()
            end = math.inf if self.deadline is None else self.deadline
            cell = next((cell for cell in ready if now + (expected_seconds(cell, rows) or 0.0) <= end), None)
            if cell is None:
                break
            folder = self.folder.run_folder(cell.fingerprint)
            self.running[self.executor.submit(execute, cell, folder, self.command, self.deadline)] = cell
        return bool(self.running)

    def _keep(self, future: Future[Any], console: Console) -> None:
        """Record a run that ended."""
        cell = self.running.pop(future)
        try:
            row, history = future.result()
        except BrokenExecutor:
            lost = {"status": "failed", "message": "a process of the study was killed", "wall_clock_seconds": 0.0}
            row, history = cell.identity | lost | {"configuration": {}}, []
        self.folder.append(row, history)
        self.rows[cell.fingerprint] = row
        self.failed += row["status"] == "failed"
        number = self.plan.size - self.plan.left(self.rows)
        line = f"[{number}/{self.plan.size}] {cell.label}: {outcome(row)} ({row['wall_clock_seconds']:.0f} s)"
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _seconds_left(self) -> float | None:
        rows = list(self.rows.values())
        known = [s for cell in self.plan.ready(self.rows) if (s := expected_seconds(cell, rows)) is not None]
        return sum(known) / len(known) * self.plan.left(self.rows) / self.jobs if known else None

    def _summary(self) -> str:
        left, seconds = self.plan.left(self.rows), self._seconds_left()
        hopeless = [f"{c.method} × {c.workers}" for c in self.plan.chains if c.is_hopeless(self.rows)]
        about = f", about {_spoken(seconds)}" if seconds is not None else ""
        words: list[Any] = [
            f"{self.plan.size - left} of {self.plan.size} runs are done in {self.folder.path}",
            left and f"{left} are left{about}",
            self.failed and f"{self.failed} failed, see `message` in rows.jsonl; the next call tries them again",
            hopeless and f"no trial of {', '.join(hopeless)} trained, so none is reported",
        ]
        return "; ".join(word for word in words if word) + "."


def expected_seconds(cell: Cell, rows: Sequence[Row]) -> float | None:
    """The mean time of like runs: same method and batch size, or else same batch size, or else any; None without."""
    finished = [row for row in rows if row["status"] == "finished"] or [r for r in rows if r["status"] == "diverged"]
    same_batch = [row for row in finished if row["workers"] == cell.workers]
    same_method = [row for row in same_batch if row["method"] == cell.method]
    times = [row["wall_clock_seconds"] for row in same_method or same_batch or finished]
    return sum(times) / len(times) if times else None


def outcome(row: Row) -> str:
    """The result of a run, in a few words."""
    if row["status"] == "failed":
        return f"failed, {row['message']}"
    if row["status"] == "diverged":
        return "diverged" + (f" at step {row['diverged_at']}" if row["diverged_at"] is not None else "")
    return f"validation {row['metric']} {row['validation'][row['metric']]:.4g}"


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
