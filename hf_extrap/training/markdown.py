"""Texts of users in Markdown: names and commands that stay text in model cards, reports and on the terminal."""

from __future__ import annotations

import re

LONGEST_NAME = 200


def one_line(text: str) -> str:
    """The text on one line, without control characters, and of at most `LONGEST_NAME` characters."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


def escaped(name: str) -> str:
    """The name on one line, with a backslash before what Markdown, HTML, tables and templates would interpret."""
    return escaped_text(one_line(name))


def escaped_text(text: str) -> str:
    """A text of any length, on one line, escaped like a name."""
    return re.sub(r"([\\`*\[\]<>|{}]|^#|---)", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """The text on one line as a code span, which no backtick in it ends."""
    line = " ".join(text.split())
    fence = _fence(line, 1)
    padding = " " if "`" in line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def code_block(text: str, language: str) -> str:
    """The text as a fenced block, which no backticks in it end."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence(text: str, shortest: int) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)
