"""One run of a study, in this process: trained, resumed or read back, and recorded in one row."""

from __future__ import annotations

import datetime
import gc
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_extrap.lab.study.folder import DROPPED
from hf_extrap.lab.study.plan import Cell
from hf_extrap.lab.study.rows import Row
from hf_extrap.lab.study.statistics import gradients_per_step
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes.configuration import resolve
from hf_extrap.recipes.run import run
from hf_extrap.recipes.run_folder import UNCOMPARED, RunFolder
from hf_extrap.training.versions import versions


class OutOfTime(Exception):
    """The study's time is over; the next call resumes the run, or begins it again."""


class Deadline(TrainerCallback):
    """Ends a run by `OutOfTime` after the first step that ends later than `moment`, in seconds since the epoch."""

    def __init__(self, moment: float) -> None:
        self.moment = moment

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.time() > self.moment:
            raise OutOfTime


def execute(cell: Cell, folder: RunFolder, command: str, deadline: float | None = None) -> tuple[Row, list[Row]]:
    """Train one run in its folder, or resume it; an error becomes a row with the status `failed`.

    Returns:
        Its row and its history.

    Raises:
        OutOfTime: the deadline passed, in seconds since the epoch.
    """
    began = time.perf_counter()
    row, history, given = cell.identity, [], {}
    try:
        configuration = resolve(cell.config, [*cell.words, f"--output_dir={folder.path}"])
        if not folder.is_finished:
            if folder.last_checkpoint() is not None:
                configuration.training_arguments.resume_from_checkpoint = "true"
            run(configuration, command, [Deadline(deadline)] if deadline is not None else [], print_logs=False)
        # Read back, so that numbers that are not finite are null.
        history = folder.read_history()
        try:
            row |= _measured(folder.read_metrics(), history)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder.path} holds no results of a run ({error!r}); delete the folder.") from error
        given = {name: value for name, value in configuration.given.items() if name not in UNCOMPARED}
    except OutOfTime:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = " ".join(str(error).split())[:500]
        message = f"{type(error).__name__}: {told} ({Path(place.filename).name}, line {place.lineno})"
        row |= {"status": "failed", "message": message}
    gc.collect()
    return row | {
        "wall_clock_seconds": round(time.perf_counter() - began, 3),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "configuration": given,
    }, history


def _measured(metrics: dict[str, Any], history: list[dict[str, Any]]) -> Row:
    """What a row keeps of metrics.json."""
    steps, seconds = metrics["steps"], metrics["seconds_per_step"]
    per_step = gradients_per_step(ExtrapConfig.from_dict(metrics["extrap"]), steps)
    losses = [row["loss"] for row in history if row.get("loss") is not None]
    same = (
        *("status", "diverged_at", "task", "metric", "greater_is_better", "extrap", "optimizer", "device"),
        *("learning_rate", "peak_learning_rate", "train_loss", "steps", "epochs"),
    )
    split = {
        # Without the prefix, and without times.
        prefix: {
            name.removeprefix(prefix): value
            for name, value in (found or {}).items()
            if name.startswith(prefix) and not name.endswith(DROPPED) and isinstance(value, int | float)
        }
        for prefix, found in (("eval_", metrics["eval"]), ("test_", metrics["test"]))
    }
    return {
        **{name: metrics[name] for name in same},
        "batch_size": metrics["global_batch_units"],
        "first_loss": losses[0] if losses else None,
        "validation": split["eval_"],
        "test": split["test_"],
        "seconds_per_step": seconds,
        # Without evaluations, and whole for a run that was resumed.
        "seconds": seconds * steps if seconds is not None else None,
        "gradients_per_step": per_step,
        "gradients": per_step * steps,
    }
