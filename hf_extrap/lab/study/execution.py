"""One run of a study, in this process: trained, resumed or read back, and told in one row."""

from __future__ import annotations

import datetime
import gc
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_extrap.lab.study.folder import DROPPED
from hf_extrap.lab.study.plan import Cell, Row
from hf_extrap.lab.summary import gradients_per_step
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes.configuration import resolve
from hf_extrap.recipes.run import run
from hf_extrap.recipes.run_folder import UNCOMPARED, RunFolder, versions


class OutOfTime(Exception):
    """The study's time is over; the run goes on, or begins again, in the next call."""


class Deadline(TrainerCallback):
    """Ends a run by `OutOfTime` after the first step that ends later than `moment`, in seconds since the epoch."""

    def __init__(self, moment: float) -> None:
        self.moment = moment

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.time() > self.moment:
            raise OutOfTime


@dataclass(frozen=True)
class Job:
    """What a process needs to know to execute one run.

    Attributes:
        study: its name.
        config: the recipe.
        folder: where the run works.
        command: what the user typed.
    """

    cell: Cell
    study: str
    config: Path
    folder: Path
    command: str

    @property
    def identity(self) -> Row:
        """What a row of this run begins with, however the run ends."""
        names = ("stage", "method", "workers", "trial", "point", "seed", "fingerprint")
        return {"study": self.study, **{name: getattr(self.cell, name) for name in names}}


def execute(job: Job, deadline: float | None = None) -> tuple[Row, list[dict[str, Any]]]:
    """Train one run, or go on with it; an error becomes a row with the status `failed`.

    Args:
        job: the run.
        deadline: in seconds since the epoch.

    Returns:
        Its row and its history.

    Raises:
        OutOfTime: the deadline passed.
    """
    began = time.perf_counter()
    folder = RunFolder(job.folder)
    row = job.identity
    history: list[dict[str, Any]] = []
    try:
        metrics, configuration = _metrics(job, folder, deadline)
        history = folder.read_history()
        row |= _measured(metrics, history)
    except OutOfTime:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = " ".join(str(error).split())[:500]
        configuration = {}
        row |= {
            "status": "failed",
            "message": f"{type(error).__name__}: {told} ({Path(place.filename).name}, line {place.lineno})",
        }
    gc.collect()
    return row | {
        "wall_clock_seconds": round(time.perf_counter() - began, 3),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "configuration": {name: value for name, value in configuration.items() if name not in UNCOMPARED},
    }, history


def _metrics(job: Job, folder: RunFolder, deadline: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    configuration = resolve(job.config, [*job.cell.words, f"--output_dir={folder.path}"])
    if not folder.is_finished:
        if folder.last_checkpoint() is not None:
            configuration.training_arguments.resume_from_checkpoint = "true"
        callbacks = [Deadline(deadline)] if deadline is not None else []
        run(configuration, job.command, callbacks, print_logs=False)
    # As they were written: numbers that are not finite are null.
    return folder.read_metrics(), configuration.given


def _measured(metrics: dict[str, Any], history: list[dict[str, Any]]) -> Row:
    """What a row keeps of metrics.json."""
    steps, seconds = metrics["steps"], metrics["seconds_per_step"]
    per_step = gradients_per_step(ExtrapConfig.from_dict(metrics["extrap"]), steps)
    losses = [row["loss"] for row in history if row.get("loss") is not None]
    same = ("status", "diverged_at", "task", "metric", "greater_is_better", "extrap", "optimizer", "device")
    return {
        **{name: metrics[name] for name in same},
        "batch_size": metrics["global_batch_units"],
        **{name: metrics[name] for name in ("learning_rate", "peak_learning_rate", "train_loss", "steps", "epochs")},
        "first_loss": losses[0] if losses else None,
        "validation": _split(metrics["eval"], "eval_"),
        "test": _split(metrics["test"] or {}, "test_"),
        "seconds_per_step": seconds,
        # Without evaluations, and whole for a run that was resumed.
        "seconds": seconds * steps if seconds is not None else None,
        "gradients_per_step": per_step,
        "gradients": per_step * steps,
    }


def _split(found: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of one split, without its name and without times."""
    return {
        name.removeprefix(prefix): value
        for name, value in found.items()
        if name.startswith(prefix) and not name.endswith(DROPPED) and isinstance(value, int | float)
    }
