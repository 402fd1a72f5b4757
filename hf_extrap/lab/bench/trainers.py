"""ExtrapTrainer and the stock Trainer: seconds of a whole step, including callbacks."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .timing import MANY, WARM_UPS, interleaved

STEPS, UNCOUNTED = 20, 5
"""Steps of a training run, and the number of first steps that are not counted."""

GROUPS = (("base", "none", "extrap-past"),)
"""Methods that are interleaved with each other."""


class _Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(3, 1000, (32,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


def _model() -> nn.Module:
    from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 128, "embedding_size": 128, "num_hidden_layers": 1}
    return ExtrapLstmForCausalLM(ExtrapLstmConfig(**sizes, dropout=0.0))


def run(kinds: Sequence[str], rounds: int, end: float) -> dict[str, Any]:
    """Train with each kind in turn, `MANY` times per round; no training begins after `end` (`time.monotonic`)."""
    with tqdm(total=WARM_UPS + MANY * rounds, desc="trainer", unit="round") as bar:
        trainings = {kind: partial(_train, kind) for kind in kinds}
        found = interleaved(trainings, MANY * rounds, bar.update, lambda: time.monotonic() >= end)
    # The time of a whole training includes its start; the time of its steps is what it returns.
    shared: dict[str, Any] = {"base_step": found["base"]["optimizer"]} if found else {}
    shared |= {"block": STEPS - UNCOUNTED, "parameters": sum(p.numel() for p in _model().parameters())}
    return {kind: {"step": row["optimizer"], **shared} for kind, row in found.items()}


def _train(kind: str) -> float:
    """Train, and return the median seconds of a step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from hf_extrap import ExtrapTrainer, ExtrapTrainingArguments

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    torch.manual_seed(0)
    fields: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 16, "disable_tqdm": True}
    fields |= {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        fields |= {"output_dir": folder, "use_cpu": not torch.cuda.is_available()}
        if kind == "base":
            trainer = Trainer(_model(), TrainingArguments(**fields), train_dataset=_Rows())
        else:
            trainer = ExtrapTrainer(_model(), ExtrapTrainingArguments(extrap=kind, **fields), train_dataset=_Rows())
        trainer.add_callback(Clock())
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    return float(np.median(seconds[UNCOUNTED:]))
