"""What a refusal is: one sentence of this package that says what is allowed."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hf_extrap

PACKAGE = Path(hf_extrap.__file__).parent


def assert_refusal(error: BaseException) -> None:
    """The error is raised in this package, in one sentence that says what is allowed."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    sentence = str(error)
    assert Path(last.filename).is_relative_to(PACKAGE), f"{error!r} is raised in {last.filename}:{last.lineno}"
    assert isinstance(error, (ValueError, TypeError, RuntimeError)), repr(error)
    assert sentence.endswith("."), repr(error)
    assert "\n" not in sentence, repr(error)
    assert any(word in sentence for word in ("allowed", "give ", "call ", "need")), repr(error)


@contextmanager
def refused_or_done() -> Iterator[list[BaseException]]:
    """The code inside ends, or is refused; yields a list that then holds the error."""
    refused: list[BaseException] = []
    try:
        yield refused
    except Exception as error:
        if isinstance(error, AssertionError):
            raise
        try:
            assert_refusal(error)
        except AssertionError as wrong:
            raise wrong from error
        refused.append(error)
