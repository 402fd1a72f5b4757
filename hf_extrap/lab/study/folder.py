"""The folder of a study: a row for each run, compact histories, and the runs that are under way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_extrap.lab.study.rows import Row, parse_row
from hf_extrap.lab.study.specification import Study
from hf_extrap.recipes.run_folder import RunFolder, plain, read_rows, read_text, write_text

ROWS_FILE, HISTORIES, RUNS, LOCK_FILE = "rows.jsonl", "histories", "runs", ".lock"

KEPT = ("step", "loss", "learning_rate")
"""History keys that are kept, beside all of evaluations and of the extrapolation."""
DROPPED = ("_runtime", "_per_second", "_preparation_time")
"""Endings of the keys that tell how long an evaluation took."""


@dataclass(frozen=True)
class StudyFolder:
    """rows.jsonl, one line a run, to which lines are only added; of two lines for one run the later one counts."""

    path: Path

    def lock(self) -> FileLock:
        """Keep other programs from running the same study in this folder, until released.

        Raises:
            ValueError: another one does so now.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"{self.path} is in use by another `hf-extrap study run`; wait, or stop it.") from error
        return lock

    def read(self) -> dict[str, Row]:
        """The row of each run that is done, by its fingerprint.

        Raises:
            ValueError: a line is not a row.
        """
        path = self.path / ROWS_FILE
        if not path.is_file():
            return {}
        rows = {}
        # What follows the last newline was cut off while it was written.
        for number, line in enumerate(read_text(path).split("\n")[:-1], 1):
            row = parse_row(line, f"{path}, line {number},")
            rows[row["fingerprint"]] = row
        return rows

    def append(self, row: Mapping[str, Any], history: Iterable[Mapping[str, Any]]) -> None:
        """Write down a run that is done, and forget its own folder."""
        text = "".join(json.dumps(compact, allow_nan=False) + "\n" for compact in map(_compact, history))
        if text:
            write_text(self.path / HISTORIES / f"{row['fingerprint']}.jsonl", text)
        path = self.path / ROWS_FILE
        with open(path, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(plain(row), allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(self.run_folder(row["fingerprint"]).path, ignore_errors=True)

    def history(self, fingerprint: str) -> list[dict[str, Any]]:
        """The rows of a run's compact history; empty if it logged nothing."""
        return read_rows(self.path / HISTORIES / f"{fingerprint}.jsonl")

    def run_folder(self, fingerprint: str) -> RunFolder:
        """Where a run works until it is done."""
        return RunFolder(self.path / RUNS / fingerprint)


def study_folder(study: Study, output_dir: str | Path | None) -> StudyFolder:
    """The given folder, or runs/study-<name>."""
    return StudyFolder(Path(output_dir or Path("runs") / f"study-{study.name}"))


def _compact(row: Mapping[str, Any]) -> dict[str, Any]:
    """The kept items, with six digits, which are more than a figure shows."""
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in plain(row).items()
        if (name in KEPT or name.startswith(("eval_", "extrap/"))) and not name.endswith(DROPPED)
    }
