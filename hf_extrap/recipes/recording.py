"""Callbacks of a run: its history, step times, identical replicas, and progress."""

from __future__ import annotations

import hashlib
import time
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from hf_extrap.optim.sharding import is_sharded
from hf_extrap.recipes.run_folder import RunFolder
from hf_extrap.training.figures import spoken

#: Steps per second, without evaluations and saving, since the last logged row.
RATE = "steps_per_second"


def parameter_checksum(model: nn.Module) -> str:
    """SHA-256 of all parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def replicas_agree(model: nn.Module) -> bool | None:
    """Whether the parameters of all processes are bit-identical; None if they are sharded. A collective call."""
    if any(map(is_sharded, model.parameters())):
        return None
    return len(set(gather_object([parameter_checksum(model)]))) == 1


class RunRecorder(TrainerCallback):
    """Writes history.jsonl, times the steps, and compares the replicas after every epoch.

    Attributes:
        replicas_identical: whether the replicas were bit-identical at the end of every epoch so far.
        intervals: seconds from the start of a step to the start of the next, without evaluation or saving in between.
        waits: seconds from the end of a step to the start of the next, spent on loading data and nothing else.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.replicas_identical = True
        self.intervals: list[float] = []
        self.waits: list[float] = []
        self._began: float | None = None
        self._ended: float | None = None
        self._unlogged: list[float] = []
        # A resumed run keeps the rates of the steps before its checkpoint.
        self._rates: dict[int, float] = {row["step"]: row[RATE] for row in folder.read_history() if RATE in row}

    @property
    def seconds_per_step(self) -> float | None:
        """Mean seconds per step including data loading, without the first step; None before the second step."""
        kept = self.intervals[1:] if len(self.intervals) > 2 else self.intervals
        return fmean(kept) if kept else None

    @property
    def data_seconds_per_step(self) -> float | None:
        """Mean seconds per step of waiting for data; None if every step is logged."""
        return fmean(self.waits) if self.waits else None

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self._began is not None:
            self.intervals.append(now - self._began)
        if self._ended is not None:
            self.waits.append(now - self._ended)
        self._began = now

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ended = time.perf_counter()
        if self._began is not None:
            self._unlogged.append(self._ended - self._began)
        if self._began is not None and (control.should_training_stop or state.global_step >= state.max_steps):
            self.intervals.append(self._ended - self._began)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began = self._ended = None

    on_save = on_evaluate

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ended = None
        if self._unlogged:
            self._rates[state.global_step] = len(self._unlogged) / sum(self._unlogged)
            self._unlogged.clear()
        if state.is_world_process_zero:
            self.folder.write_history(self.history(state))

    def history(self, state: TrainerState) -> list[dict[str, Any]]:
        """The logged rows, those of training with their steps per second."""
        rates = self._rates
        return [
            {**row, RATE: rates[int(row["step"])]} if "loss" in row and int(row["step"]) in rates else row
            for row in state.log_history
        ]

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ended = None
        self.replicas_identical &= replicas_agree(kwargs["model"]) is not False


class ConciseProgress(ProgressCallback):
    """The stock progress bar with the latest loss, and one line per evaluation."""

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}, lr {logs.get('learning_rate', 0):.3g}")
        elif f"eval_{self.metric}" in logs:
            value, loss = logs[f"eval_{self.metric}"], logs.get("eval_loss", float("nan"))
            self.training_bar.write(
                f"step {state.global_step}: validation {spoken(self.metric)} {value:.4g}, loss {loss:.4g}"
            )
