"""Names in a run's folder, and its checkpoints."""

from __future__ import annotations

from pathlib import Path

MANIFEST_FILE = "checkpoint_manifest.json"
STATE_FILE = "trainer_state.json"
ASIDE = "_incomplete"
"""Folder in the run's folder, on the same disk, in which a checkpoint is written or deleted; uploads leave out `_*`."""


class CheckpointNotFoundError(FileNotFoundError, ValueError):
    """There is no checkpoint; transformers raises a ValueError with the same first words, which scripts catch."""


def checkpoints(folder: Path) -> list[Path]:
    """The folders checkpoint-N in a folder, by N; nothing is verified."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))
