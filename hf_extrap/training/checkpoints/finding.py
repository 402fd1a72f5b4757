"""Which checkpoint a run resumes from: the newest whole one, or a given one that is whole."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

from accelerate.state import PartialState
from accelerate.utils import gather_object, get_int_from_env

from .folders import ASIDE, MANIFEST_FILE, STATE_FILE, CheckpointNotFoundError, checkpoints
from .manifest import find_damage
from .saving import recover

Integrity = Literal["strict", "warn", "off"]
logger = logging.getLogger(__name__)


def check_exists(resume: str | Path | bool | None, output_dir: Path) -> bool:
    """Whether a run is to resume, as in `find_checkpoint`; nothing is verified.

    Raises:
        CheckpointNotFoundError: there is no such folder, or no checkpoint in `output_dir`.
    """
    word = str(resume or False)
    if word.lower() == "false":
        return False
    if word.lower() != "true":
        if not Path(word).is_dir():
            raise CheckpointNotFoundError(f"Can't find a valid checkpoint at {word}: checkpoint {word} does not exist.")
    # In this order, since another process may be moving one from the first folder to the second.
    elif not (checkpoints(output_dir / ASIDE) or checkpoints(output_dir)):
        raise _none_in(output_dir, "no checkpoint to resume from")
    return True


def find_checkpoint(resume: str | Path | bool | None, output_dir: Path, integrity: Integrity) -> Path | None:
    """The checkpoint to resume from, verified; a collective call.

    Args:
        resume: a folder; true, as a word too, for the newest checkpoint in `output_dir`; None or false for none.
        output_dir: of the run.
        integrity: `strict` refuses a damaged folder that is given, and passes over damaged ones in `output_dir`;
            `warn` logs the damage; `off` verifies nothing.

    Raises:
        CheckpointNotFoundError: there is no such folder, or no whole checkpoint in `output_dir`.
        ValueError: the given checkpoint is damaged; the sentence names the files.
    """
    if not check_exists(resume, output_dir):
        return None
    if str(resume).lower() != "true":
        path = Path(str(resume))
        check_whole(path, integrity)
        return path
    if PartialState().is_local_main_process:
        recover(output_dir)
    PartialState().wait_for_everyone()
    passed_over = []
    for path in reversed(checkpoints(output_dir)):
        damage = damage_of(path, integrity)
        if not damage or integrity == "warn":
            _warn(path, damage)
            return path
        passed_over.append(f"{path.name}: {_listed(damage)}")
        logger.warning("checkpoint %s is damaged (%s) and passed over", path, _listed(damage))
    reason = f"no whole checkpoint ({'; '.join(passed_over)})" if passed_over else "no checkpoint to resume from"
    raise _none_in(output_dir, reason)


def check_whole(checkpoint: Path, integrity: Integrity) -> None:
    """Raise a ValueError, or warn, if a checkpoint is damaged; a collective call."""
    damage = damage_of(checkpoint, integrity)
    if damage and integrity == "strict":
        raise ValueError(
            f"checkpoint {checkpoint} is damaged: {_listed(damage)}; allowed: a whole checkpoint "
            "(resume_from_checkpoint true takes the newest one), or checkpoint_integrity warn."
        )
    _warn(checkpoint, damage)


def damage_of(checkpoint: Path, integrity: Integrity) -> list[str]:
    """What is wrong with a checkpoint, the same list in every process; the processes of a machine share the reading."""
    if integrity == "off":
        return []
    if (checkpoint / MANIFEST_FILE).is_file():
        count = get_int_from_env(["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"], 1)
        share = (PartialState().local_process_index if count > 1 else 0, count)
        found = find_damage(checkpoint, share)
    else:
        found = _missing(checkpoint)
        if not found:
            logger.warning("checkpoint %s has no %s: its files cannot be verified", checkpoint, MANIFEST_FILE)
    return sorted(set(gather_object(found)))


def _missing(checkpoint: Path) -> list[str]:
    """What a checkpoint without a manifest lacks, such as one of the stock Trainer or one that was cut off."""
    needed = {
        "its optimizer state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
        "scheduler.pt": ("scheduler.pt",),
        "rng_state.pth": ("rng_state*.pth",),
    }
    found = [
        f"{name} is missing"
        for name, patterns in needed.items()
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns)
    ]
    try:
        int(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found.append(f"{STATE_FILE} is unreadable ({type(error).__name__})")
    return found


def _none_in(output_dir: Path, reason: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"No valid checkpoint found in output directory ({output_dir}): output_dir holds {reason}."
    )


def _warn(checkpoint: Path, damage: list[str]) -> None:
    if damage:
        logger.warning("checkpoint %s is damaged: %s", checkpoint, _listed(damage))


def _listed(damage: list[str], most: int = 3) -> str:
    more = f" and {len(damage) - most} more" if len(damage) > most else ""
    return ", ".join(damage[:most]) + more
