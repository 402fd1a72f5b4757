"""The rows of a study, one for each run that is done, and their check when they are read from a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hf_extrap.recipes.run_folder import parse_json

Row = dict[str, Any]


def parse_row(text: str, name: str) -> Row:
    """Parse one line of rows.jsonl.

    Raises:
        ValueError: in one sentence that begins with `name`: the line is not a row.
    """
    row = parse_json(text, name)
    fields = IDENTITY | (MEASURED if row.get("status") != "failed" else {"message": _text})
    for field, holds in fields.items():
        if field not in row or not holds(row[field]):
            raise ValueError(f"{name} is not a row of a study: its {field} is {row.get(field)!r:.60}; delete the line.")
    versions = row.get("versions", {})
    if not isinstance(versions, dict) or not all(map(_text, versions.values())):
        raise ValueError(f"{name} is not a row of a study: its versions are no texts; delete the line.")
    if row["status"] == "finished" and not _number(row["validation"].get(row["metric"])):
        raise ValueError(f"{name} is not a row of a study: it finished without {row['metric']!r:.60}; delete the line.")
    return row


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _optional(value: Any) -> bool:
    return value is None or _number(value)


def _whole(value: Any) -> bool:
    return type(value) is int


def _scores(value: Any) -> bool:
    return isinstance(value, dict) and all(_optional(score) for score in value.values())


IDENTITY: dict[str, Callable[[Any], bool]] = {
    "fingerprint": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None,
    "stage": lambda value: value in ("tune", "final"),
    "status": lambda value: value in ("finished", "diverged", "failed"),
    "method": _text,
    "workers": _whole,
    "trial": _whole,
    "seed": _whole,
    "point": lambda value: isinstance(value, dict),
    "wall_clock_seconds": _number,
}
"""Fields of every row, and what each holds."""
MEASURED: dict[str, Callable[[Any], bool]] = {
    "metric": _text,
    "greater_is_better": lambda value: isinstance(value, bool),
    "validation": _scores,
    "test": lambda value: value is None or _scores(value),
    "extrap": lambda value: isinstance(value, dict),
    "steps": _whole,
    "batch_size": _number,
    "seconds_per_step": _optional,
    "first_loss": _optional,
    "learning_rate": _optional,
    "peak_learning_rate": _optional,
    "diverged_at": _optional,
}
"""Fields of a row whose run did not fail, and what each holds."""
