"""Runs of the toy Trainer in processes of their own, which are killed at a given moment."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_extrap.training.signals import stopping_on_signals
from tests.support.in_processes import start
from tests.support.tiny_trainer import Sentences, gpt2, make, weights

FIELDS: dict[str, Any] = {
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
}
ENGINES = {"one": 1, "ddp": 2, "uneven": 2, "zero1": 2, "fsdp2": 2}
"""Number of processes by name; `uneven` is DDP with an odd number of samples."""
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree")


@dataclass(frozen=True)
class Kill:
    """SIGKILL of a process by itself.

    Attributes:
        ranks: that are killed.
        event: `file` for the `number`-th operation on a file in the run's folder, `step` and `evaluation` for the
            `number`-th of this process, `signal` for SIGTERM in that step, `slow` for no kill at all, but a pause of
            0.02 seconds before each operation and step.
        number: from 1.
    """

    ranks: tuple[int, ...]
    event: str
    number: int


class CallbackKill(TrainerCallback):
    """Kills in the middle of a step, and in an evaluation."""

    def __init__(self, kill: Kill) -> None:
        self.kill = kill
        self.steps, self.evaluations = itertools.count(1), itertools.count(1)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.kill.event == "slow":
            time.sleep(0.02)
        signals = {"step": signal.SIGKILL, "signal": signal.SIGTERM}
        if next(self.steps) == self.kill.number and self.kill.event in signals:
            os.kill(os.getpid(), signals[self.kill.event])

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if next(self.evaluations) == self.kill.number and self.kill.event == "evaluation":
            os.kill(os.getpid(), signal.SIGKILL)


def operations(folder: Path, kill: Kill | None) -> itertools.count[int]:
    """Count the operations on files below a folder, and kill this process before one of them."""
    counter, inside = itertools.count(1), str(folder)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event in EVENTS and str(values[0]).startswith(inside):
            number = next(counter)
            if kill is not None and kill.event == "slow":
                time.sleep(0.02)
            elif kill is not None and kill.event == "file" and kill.number == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counter


def attempt(beside: Path, rank: int, folder: Path, engine: str, kill: Kill | None) -> None:
    """Train to the end, from the newest whole checkpoint; leaves a digest of the weights and a count of operations."""
    fields = {**FIELDS, "extrap": "optimistic" if engine == "fsdp2" else "extrap-past"}
    if engine in ("zero1", "fsdp2"):
        # Only here, since DeepSpeed takes seconds to import.
        from tests.support.trainer_engines import fsdp, whole, zero

        fields |= fsdp() if engine == "fsdp2" else {"deepspeed": zero(engine)}
    else:
        whole = weights
    mine = kill if kill is not None and rank in kill.ranks else None
    counter = operations(folder, mine)
    callbacks = [CallbackKill(mine)] if mine is not None else []
    resume = True if any(folder.glob("checkpoint-*")) else None
    trainer = make(folder, model=gpt2(dropout=0.1), callbacks=callbacks, **fields)
    if engine == "uneven":
        trainer.train_dataset = Sentences(61)
    with stopping_on_signals(trainer):
        trainer.train(resume_from_checkpoint=resume)
    digest = hashlib.sha256(whole(trainer).numpy().tobytes()).hexdigest()
    (beside / f"rank_{rank}.done").write_text(f"{digest} {next(counter)}")


def launch(folder: Path, engine: str, kill: Kill | None) -> list[int | None]:
    """One attempt in as many processes as the engine has; returns their exit codes, None for one that hangs."""
    beside = folder.parent / f"{folder.name}_processes"
    beside.mkdir(exist_ok=True)
    return start(attempt, beside, ENGINES[engine], folder, engine, kill, timeout=120)


def digests(folder: Path, engine: str) -> tuple[set[str], int]:
    """The digests that the processes have left, and the number of operations of the first one."""
    beside = folder.parent / f"{folder.name}_processes"
    texts = [(beside / f"rank_{rank}.done").read_text().split() for rank in range(ENGINES[engine])]
    return {digest for digest, _ in texts}, int(texts[0][1])
