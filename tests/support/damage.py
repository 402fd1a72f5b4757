"""Ways in which a file is damaged."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

PICKLED = "planted_pickle_ran"
"""A file of this name appears in the working directory if a planted pickle is loaded."""


class Planted:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path(PICKLED).resolve(),)


def delete(path: Path, other: Path) -> None:
    path.unlink()


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path, other: Path) -> None:
    """One bit, at a place that the file's name determines."""
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(len(content))] ^= 4
    path.write_bytes(content)


def garble(path: Path, other: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def lengthen(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swap(path: Path, other: Path) -> None:
    """The file of the same name of another checkpoint."""
    content = other.read_bytes()
    path.write_bytes(content if content != path.read_bytes() else content + b" ")


def plant(path: Path, other: Path) -> None:
    path.write_bytes(pickle.dumps(Planted()))


def make_folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def leave(path: Path, other: Path) -> None:
    """A link to the same content outside of the folder."""
    checkpoint = next(parent for parent in path.parents if parent.name.startswith("checkpoint-"))
    outside = checkpoint.parent / f"outside_{path.name}"
    os.replace(path, outside)
    path.symlink_to(outside)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    each.__name__: each
    for each in (delete, empty, halve, flip, garble, lengthen, swap, plant, make_folder, dangle, leave)
}


def copy(source: Path, target: Path) -> Path:
    """A copy of a folder, in place of what was there."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target, symlinks=True)
