"""Parameters of tests that run a few cells by default, and the others in the matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

MARKS = {"few": (), "matrix": pytest.mark.matrix}


def each(cells: Mapping[str, Sequence[Any]], names: str) -> pytest.MarkDecorator:
    """Run a test with each cell, as `names`, and with its kind, as `which`: `few`, or `matrix`, which is marked."""
    found = [
        pytest.param(*(values := cell if isinstance(cell, tuple) else (cell,)), which, marks=mark, id=_id(values))
        for which, mark in MARKS.items()
        for cell in cells[which]
    ]
    return pytest.mark.parametrize(f"{names},which", found)


def _id(values: tuple[Any, ...]) -> str:
    return "-".join(map(str, values))
