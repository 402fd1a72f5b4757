"""SIGTERM and Ctrl-C save a checkpoint and leave with a code of their own; torchrun restarts a job that lost a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_extrap.training.signals import StoppedBySignal, stopping_on_signals
from tests.support.killed import FIELDS, Kill, digests, launch
from tests.support.tiny_trainer import gpt2, make, train, weights

SINGLE: dict[str, Any] = {**FIELDS, "extrap": "extrap-past"}


class Signal(TrainerCallback):
    """Sends this process a signal amid a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [3, 12])
def test_a_signal_saves_and_a_resume_is_bit_identical(
    tmp_path: Path, number: int, code: int, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(tmp_path / "whole", model=gpt2(dropout=0.1), **SINGLE)
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    trainer = make(tmp_path / "run", model=gpt2(dropout=0.1), callbacks=[Signal(number, step)], **SINGLE)
    with pytest.raises(StoppedBySignal) as stopped, stopping_on_signals(trainer):
        trainer.train()
    assert stopped.value.code == code
    assert f"stopped by {signal.Signals(number).name} after step {step}; checkpoint-{step} is saved" in caplog.text
    assert trainer.state.global_step == step and (tmp_path / "run" / f"checkpoint-{step}").is_dir()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = train(tmp_path / "run", model=gpt2(dropout=0.1), resume=True, **SINGLE)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    twice = [Signal(signal.SIGINT, 3), Signal(signal.SIGINT, 3)]
    trainer, before = make(tmp_path, callbacks=twice, **SINGLE), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopping_on_signals(trainer):
        trainer.train()
    assert trainer.state.global_step == 2
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.distributed
@pytest.mark.matrix
def test_processes_that_see_a_signal_in_different_steps_stop_in_the_same_one(tmp_path: Path) -> None:
    assert launch(tmp_path / "whole", "ddp", None) == [0, 0]
    # The second process alone receives it.
    assert launch(tmp_path / "run", "ddp", Kill((1,), "signal", 5)) == [143, 143]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-4", "checkpoint-5"}
    assert launch(tmp_path / "run", "ddp", None) == [0, 0]
    assert digests(tmp_path / "run", "ddp")[0] == digests(tmp_path / "whole", "ddp")[0]


@pytest.mark.distributed
@pytest.mark.matrix
def test_torchrun_names_the_rank_that_died_and_its_restart_resumes(
    tiny_language_model: Path, tmp_path: Path, launch: Callable[..., str]
) -> None:
    """The other process ends too, and `--max_restarts 1` needs no further word but for pytorch issue 135712.

    By default a restarted process finds the addresses of the processes that died in torchrun's store.
    """
    words = ["-m", "hf_extrap", "train", tiny_language_model, "--save_steps", "5", "--eval_steps", "40"]
    words += ["--max_steps", "40", "--logging_steps", "40"]
    launch(*words, "--output_dir", tmp_path / "whole")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "--max_restarts", "1", *map(str, words), "--output_dir", str(tmp_path / "run")]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        job = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while not any((tmp_path / "run").glob("checkpoint-*")):
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        second = next(each for each in psutil.Process(job.pid).children() if each.environ().get("RANK") == "1")
        second.kill()
        assert job.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    assert "exitcode: -9" in (tmp_path / "log").read_text() and "local_rank: 1" in (tmp_path / "log").read_text()
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
