"""The runs below some folders, and the rows that they have logged since they were last read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_extrap.recipes.run_folder import CONFIGURATION_FILE, HISTORY_FILE, RunFolder


@dataclass
class WatchedRun:
    """A run that is finished or goes on.

    Attributes:
        name: of the run on the page, its path below the watched folder.
    """

    name: str
    folder: RunFolder
    _read: int = field(default=0, init=False)
    _size: int = field(default=-1, init=False)

    def new_rows(self) -> list[dict[str, Any]]:
        """The rows of history.jsonl after those of the last call, each with its `step`.

        A resumed run may log rows again that are known: its history has no fewer rows when it goes beyond them.
        """
        path = self.folder.path / HISTORY_FILE
        size = path.stat().st_size if path.is_file() else 0
        if size == self._size:
            return []
        self._size, rows = size, self.folder.read_history()
        new, self._read = rows[self._read :], max(self._read, len(rows))
        return new

    def arguments(self) -> dict[str, Any]:
        """The fields of run.json; empty before it is written."""
        is_written = (self.folder.path / CONFIGURATION_FILE).is_file()
        return dict(self.folder.read_configuration()["arguments"]) if is_written else {}


def find_runs(folders: Sequence[Path]) -> Iterator[WatchedRun]:
    """The folders of runs that are given or lie below a given one, in the order of their paths.

    A folder with run.json or history.jsonl is that of a run. Links are not followed.

    Raises:
        FileNotFoundError: a given folder does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist, or is no folder; allowed: folders of runs.")
        found = {
            path.parent for name in (CONFIGURATION_FILE, HISTORY_FILE) for path in folder.rglob(name) if path.is_file()
        }
        for path in sorted(found):
            below = path.relative_to(folder).as_posix()
            prefix = folder.resolve().name
            name = prefix if below == "." else below if len(folders) == 1 else f"{prefix}/{below}"
            yield WatchedRun(name, RunFolder(path))
