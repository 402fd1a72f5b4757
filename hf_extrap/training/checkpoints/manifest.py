"""The manifest of a checkpoint: the size and the checksum of every file, which prove that it is whole."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from ..versions import versions
from .folders import MANIFEST_FILE

_HASH = "xxh3_128"


def write_manifest(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a folder whose files are all there, and flush files and folders to the disk.

    Args:
        checkpoint: the folder.
        facts: written beside the files: numbers and strings, such as the step and the number of processes.
    """
    files = {
        name: {"size": path.stat().st_size, _HASH: checksum_of(path)}
        for name, path in sorted(_files(checkpoint))
        if name != MANIFEST_FILE
    }
    content = {**facts, "versions": versions(), "files": files}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path in [*(checkpoint / name for name in files), checkpoint / MANIFEST_FILE]:
        flush(path)
    for folder in {path.parent for _, path in _files(checkpoint)} | {checkpoint}:
        flush(folder)


def find_damage(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the files of a checkpoint, by its manifest; empty if it is whole.

    Files that the manifest does not list, such as a card that was added later, are not looked at.

    Args:
        checkpoint: a folder with a manifest.
        share: (i, n), to read the content of every n-th file from the i-th on: n processes share the reading.

    Returns:
        One phrase per file, which names it and says what differs.
    """
    try:
        content = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry[_HASH])) for name, entry in content["files"].items()}
        step = int(content["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST_FILE} is unreadable ({type(error).__name__})"]
    number = checkpoint.name.removeprefix("checkpoint-")
    if number.isdigit() and int(number) != step:
        return [f"it is a copy of checkpoint-{step}"]
    index, count = share
    found = []
    for place, (name, (size, checksum)) in enumerate(files.items()):
        if damage := _damage(checkpoint, name, size, checksum if place % count == index else None):
            found.append(f"{name} {damage}")
    return found


def checksum_of(path: Path) -> str:
    """XXH3, 128 bits: at some 10 GB/s it costs little beside loading; it detects damage, not forgery."""
    hasher = xxhash.xxh3_128()
    if path.stat().st_size:
        # Mapped, since reading into buffers is slower than hashing.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            hasher.update(content)
    return hasher.hexdigest()


def flush(path: Path) -> None:
    """Wait until the disk holds a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damage(checkpoint: Path, name: str, size: int, checksum: str | None) -> str | None:
    path = checkpoint / name
    if not path.resolve().is_relative_to(checkpoint.resolve()):
        return "lies outside of the folder"
    if not path.exists():
        return "is missing"
    if not path.is_file():
        return "is no file"
    if (found := path.stat().st_size) != size:
        return f"has {found} bytes instead of {size}"
    if checksum is not None and checksum_of(path) != checksum:
        return "has another checksum"
    return None


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path
