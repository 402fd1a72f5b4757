"""SIGTERM and Ctrl-C: save a checkpoint at the end of the step, in all processes, and leave."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from hf_extrap.optim.distributed import let_gloo_finish

SIGNALS = (signal.SIGTERM, signal.SIGINT)
logger = logging.getLogger(__name__)


class StoppedBySignal(SystemExit):
    """Training has ended at a signal, with a checkpoint; the exit code is 128 + the signal's number."""


class SignalStopper(TrainerCallback):
    """Saves and ends training after the step in which a signal has come to any process.

    Processes see a signal in different steps, and must stop in the same one: each step ends with an all-reduce of one
    number on the CPU. `transformers`' own `enable_jit_checkpoint` stops each process by itself, and saves before the
    step, when the random state has already moved on.

    Attributes:
        number: of the signal that has ended training, in every process; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._seen = 0
        self._group: Any = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler; a second signal has its usual effect."""
        self._seen = number
        for each in SIGNALS:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        number = self._seen
        if self._group is not None:
            seen = torch.tensor(number)
            dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._group)
            number = int(seen)
        if number:
            # An evaluation that is due comes first: it draws random numbers, which a resumed run must not draw again.
            self.number = number
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.number is not None and state.epoch is not None:
            # The step has saved. Training may also have stopped inside the epoch, whose end this is not then.
            is_end = float(state.epoch).is_integer()
            control.should_evaluate &= is_end
            control.should_save = is_end


@contextmanager
def stopping_on_signals(trainer: Trainer) -> Iterator[None]:
    """While training inside, SIGTERM and SIGINT end it with a checkpoint.

    Raises:
        StoppedBySignal: in every process, after the checkpoint is saved.
    """
    stopper = SignalStopper()
    trainer.add_callback(stopper)
    before = {number: signal.signal(number, stopper.receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trainer.remove_callback(stopper)
    if stopper.number is not None:
        step = trainer.state.global_step
        if trainer.is_world_process_zero():
            name = signal.Signals(stopper.number).name
            message = "stopped by %s after step %d; checkpoint-%d is saved: resume with --resume_from_checkpoint true"
            logger.warning(message, name, step, step)
        let_gloo_finish()
        raise StoppedBySignal(128 + stopper.number)
