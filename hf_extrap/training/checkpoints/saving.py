"""Checkpoints are whole or not there: written aside, proved by a manifest, and then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .folders import ASIDE, MANIFEST_FILE, STATE_FILE, checkpoints
from .manifest import find_damage, flush, write_manifest

if TYPE_CHECKING:
    from transformers import Trainer


class CheckpointWriter:
    """Redirects the Trainer's own saving.

    Args:
        trainer: its `_get_output_dir` is to return `folder_of` of the stock one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._aside: Path | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._aside is not None

    def folder_of(self, run_folder: str) -> str:
        """Where the stock Trainer puts a checkpoint."""
        return run_folder if self._aside is None else str(self._aside)

    @contextmanager
    def writing(self, run_folder: Path) -> Iterator[None]:
        """Inside, the stock Trainer saves; at the end the checkpoint stands in its place, or nothing; collective."""
        trainer, aside = self._trainer, run_folder / ASIDE
        wait, is_first_here = trainer.accelerator.wait_for_everyone, trainer.is_local_process_zero()
        if is_first_here:
            # What a process that was killed has left.
            shutil.rmtree(aside, ignore_errors=True)
        wait()
        self._aside = aside
        try:
            yield
            # Every process has written its files.
            wait()
            if trainer.state.best_model_checkpoint == str(aside / f"checkpoint-{trainer.state.global_step}"):
                trainer.state.best_model_checkpoint = str(run_folder / f"checkpoint-{trainer.state.global_step}")
            if trainer.args.should_save:
                self._finish(run_folder, aside)
            wait()
            if is_first_here and aside.exists():
                # A machine with a disk of its own, which holds the files of its own processes.
                self._finish(run_folder, aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            self._aside = None
        wait()

    def _finish(self, run_folder: Path, aside: Path) -> None:
        trainer, state = self._trainer, self._trainer.state
        written = aside / f"checkpoint-{state.global_step}"
        place, replaced = run_folder / written.name, aside / "replaced" / written.name
        if (written / STATE_FILE).exists():
            # Again, with the place of the best checkpoint.
            state.save_to_json(str(written / STATE_FILE))
        write_manifest(written, {"step": state.global_step, "processes": trainer.args.world_size})
        if place.exists():
            # Such as a damaged one, or that of the same step before a resume.
            replaced.parent.mkdir()
            os.rename(place, replaced)
        os.rename(written, place)
        flush(run_folder)
        self._rotate(run_folder, place, aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _rotate(self, run_folder: Path, newest: Path, aside: Path) -> None:
        """Delete the oldest checkpoints beyond `save_total_limit`, never the newest nor the best one."""
        limit, best = self._trainer.args.save_total_limit, self._trainer.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        kept = {newest} | ({run_folder / Path(best).name} if best is not None else set())
        found = checkpoints(run_folder)
        # First those of later steps, which a resume has passed over or left behind.
        oldest = found[found.index(newest) + 1 :] + found
        surplus = len(found) - max(limit, len(kept))
        for path in [path for path in dict.fromkeys(oldest) if path not in kept][: max(surplus, 0)]:
            # A checkpoint that is deleted halfway would be a damaged one.
            os.rename(path, aside / path.name)


def recover(run_folder: Path) -> None:
    """Put a whole checkpoint in its place whose process was killed before its renaming; delete what else was left."""
    for written in (run_folder / ASIDE).glob("checkpoint-*"):
        place = run_folder / written.name
        if (written / MANIFEST_FILE).is_file() and not place.exists() and not find_damage(written):
            os.rename(written, place)
    shutil.rmtree(run_folder / ASIDE, ignore_errors=True)
