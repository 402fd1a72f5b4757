"""The folder of a run: names, contents and atomic writing of its files."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from hf_extrap.recipes.secrets import MASK, is_secret, without_secrets
from hf_extrap.training.checkpoints.folders import ASIDE, checkpoints

CONFIGURATION_FILE = "run.json"
METRICS_FILE = "metrics.json"
HISTORY_FILE = "history.jsonl"
CARD_FILE = "README.md"
LOCK_FILE = "_run.lock"

#: Fields of places and of progress: runs that differ only in them are the same run.
UNCOMPARED = frozenset(
    "output_dir resume_from_checkpoint save_model license disable_tqdm use_cpu data_cache_dir".split()
    + "dataloader_num_workers save_total_limit checkpoint_integrity max_skipped_steps".split()
)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: its configuration, history, metrics and checkpoints."""

    path: Path

    @property
    def is_finished(self) -> bool:
        """Whether the run finished: metrics.json is the last file that a run writes."""
        return (self.path / METRICS_FILE).is_file()

    @property
    def has_begun(self) -> bool:
        """Whether the run has logged, saved or finished anything; one that has not may be replaced by another one."""
        history = self.path / HISTORY_FILE
        logged = history.is_file() and history.stat().st_size > 0
        return logged or self.is_finished or any(self.path.glob("checkpoint-*"))

    def last_checkpoint(self) -> Path | None:
        """The checkpoint with the highest step, or None; nothing is verified."""
        return next(reversed(checkpoints(self.path)), None)

    @contextmanager
    def locked(self, process_index: int) -> Iterator[None]:
        """Keep other launches out of the folder; a collective call.

        The system releases the lock when the process ends, in whatever way. A folder that is a file is left to `check`.

        Raises:
            ValueError: in every process, if another launch that is alive writes to the folder, or nobody can.
        """
        lock, problem = FileLock(self.path / LOCK_FILE, blocking=False), None
        if process_index == 0 and not self.path.is_file():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except Timeout:
                problem = "is in use by another launch, which is running; allowed: another folder"
            except OSError as error:
                problem = f"cannot be written ({error.strerror}); allowed: a folder in which files can be made"
        for found in gather_object([problem]):
            if found is not None:
                raise ValueError(f"output_dir {self.path} {found}.")
        try:
            yield
        finally:
            lock.release()

    def check(self, arguments: Mapping[str, Any], resume: bool) -> None:
        """Raise a ValueError unless a run with these resolved fields may write to the folder.

        It may not if the folder has other files, another run, or, without `resume`, checkpoints or a finished run. One
        that failed before it logged, saved or finished anything does not count: the next one replaces its run.json.
        """
        if (self.path.exists() or self.path.is_symlink()) and not self.path.is_dir():
            what = "is a file" if self.path.exists() else "is a link to nothing"
            raise ValueError(f"output_dir {self.path} {what}; allowed: a folder.")
        if not self.path.exists() or {path.name for path in self.path.iterdir()} <= {LOCK_FILE, ASIDE}:
            return
        holds, instead = f"output_dir {self.path} holds", "give another --output_dir, or delete the folder."
        if not (self.path / CONFIGURATION_FILE).is_file():
            raise ValueError(
                f"{holds} files and no {CONFIGURATION_FILE}: it is not the folder of a run; give another --output_dir."
            )
        if not self.has_begun:
            return
        recorded, given = self.read_configuration()["arguments"], plain(arguments)
        for name in different_fields(recorded, given):
            values = f"{recorded.get(name)!r}, not {given.get(name)!r}"
            raise ValueError(f"{holds} another run: its {name} is {values}; {instead}")
        if self.is_finished and not resume:
            raise ValueError(f"{holds} this run, finished; {instead}")
        if not resume and (last := self.last_checkpoint()):
            raise ValueError(
                f"{holds} this run up to {last.name}; resume with --resume_from_checkpoint true, {instead}"
            )

    def write_configuration(self, configuration: Mapping[str, Any]) -> None:
        """Write run.json: `arguments` (the resolved fields), command and versions."""
        write_json(self.path / CONFIGURATION_FILE, configuration)

    def read_configuration(self) -> dict[str, Any]:
        """The content of run.json; ValueError unless its `arguments` are a mapping."""
        content = read_json(self.path / CONFIGURATION_FILE)
        if not isinstance(content.get("arguments"), dict):
            raise ValueError(f"{self.path / CONFIGURATION_FILE} has no mapping `arguments`; allowed: a run's own file.")
        return {**content, "arguments": plain(content["arguments"])}

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json; numbers that are not finite become null."""
        write_json(self.path / METRICS_FILE, metrics)

    def read_metrics(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return read_json(self.path / METRICS_FILE)

    def write_history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write history.jsonl: one logged row per line, each with its step and epoch."""
        write_text(self.path / HISTORY_FILE, "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows))

    def read_history(self) -> list[dict[str, Any]]:
        """The rows of history.jsonl; empty before the first one."""
        return read_rows(self.path / HISTORY_FILE)


def different_fields(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the fields in which two runs differ, sorted, without `UNCOMPARED`."""
    one, other = plain(one), plain(other)
    return sorted(name for name in {*one, *other} - UNCOMPARED if one.get(name) != other.get(name))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; FileNotFoundError if there is no such file, ValueError if it is not a JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    return parse_json(read_text(path), str(path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a history, one JSON object per line; none if there is no such file.

    Raises:
        ValueError: a line is not a JSON object with a whole number as its `step`.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines() if path.is_file() else [], 1):
        row = parse_json(line, f"{path}, line {number},")
        if type(row.get("step")) is not int:
            raise ValueError(f"{path}, line {number}, has no whole number as its `step`.")
        rows.append(row)
    return rows


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Parse a JSON object whose numbers are finite and at most 64 bits long, as `write_json` writes it.

    Raises:
        ValueError: in one sentence that begins with `name`.
    """
    try:
        content = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_number)
    except RecursionError as error:
        raise ValueError(f"{name} is not valid JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}, not a JSON object.")
    return content


def _number(text: str) -> int | float:
    number: int | float = int(text) if text.lstrip("-").isdigit() and len(text) <= 20 else float(text)
    if not math.isfinite(number) or abs(number) >= 2**64 and isinstance(number, int) or len(text) > 400:
        raise ValueError(f"the number {text:.40} is out of range")
    return number


def read_text(path: Path) -> str:
    """Read a text file; ValueError, with the path, if it is not text in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8.") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically: a reader sees the old file or the new one."""
    write_text(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old file or the new one. OSError, with the path, if it cannot."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        # Writing to a full disk names no file, and the temporary name tells the user nothing.
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def plain(value: Any) -> Any:
    """Convert a value to JSON types: numbers that are not finite to None, other types to strings; and hide secrets."""
    if isinstance(value, Mapping):
        return {
            str(key): MASK if isinstance(item, str) and is_secret(str(key)) else plain(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return plain(value.item())
    # str() of an Enum that is also a str is its name, not its value.
    return without_secrets(str(getattr(value, "value", value)))
