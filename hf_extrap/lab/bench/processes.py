"""Two processes: extrapolation beside plain DistributedDataParallel, interleaved."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_extrap.lab.counting import CollectiveCounter
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.processes import let_gloo_finish

from .methods import Step
from .timing import MANY, interleaved
from .workloads import WORKLOADS, Made

CLOSE = ("base", "none", "extrap-past")
"""Those whose difference is a few per cent or none."""

GROUPS = (CLOSE, ("base", "past-update", "extrap", "extragradient"))
"""What is interleaved."""

BLOCK = 3
"""Steps in a row of those that are close, in `MANY` times the rounds."""


def run(kinds: Sequence[str], rounds: int, end: float, name: str = "lstm") -> dict[str, Any]:
    """Seconds of a step in two processes of one thread each, with one worker each, and the bytes that it sends more.

    Args:
        kinds: one of `GROUPS`.
        rounds: that were asked for.
        end: on the clock of `time.monotonic`, which all processes share; nothing is begun after it.
        name: of the workload.

    Raises:
        ValueError: if the processes fail, with the first error that they told.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", __name__]
    words = [name, str(rounds), str(end), *kinds]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise ValueError(f"the benchmark of two processes failed: {_reason(done.stderr)}")
    rows: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _reason(said: str) -> str:
    """The first error in what torchrun and its processes said; its own comes last and tells of theirs."""
    error = r"^(?:\[rank\d+\]: *)?((?!\S*ChildFailedError)[\w.]+(?:Error|Exception)\b.*)"
    if found := re.search(error, said, re.MULTILINE) or re.search(r"(Signal \d+ \(\w+\))", said):
        return found[1]
    return (said.strip().splitlines() or ["no message"])[-1]


def _measure(name: str, rounds: int, end: float, kinds: Sequence[str]) -> dict[str, Any]:
    dist.init_process_group("gloo")
    workload, rank = WORKLOADS[name], dist.get_rank()
    steps, parameters = {}, 0
    for kind in kinds:
        made = Made(workload, torch.device("cpu"))
        parameters = sum(p.numel() for p in made.params)
        model = DistributedDataParallel(made.model)
        base = workload.optimizer(made.params)
        optimizer = base if kind == "base" else Extrapolated(base, ExtrapConfig.preset(kind))

        def step(model: Any = model, optimizer: Any = optimizer) -> float:
            assert workload.loss is not None
            if isinstance(optimizer, Extrapolated):
                if optimizer.wants_probe:
                    with optimizer.probing(model=model):
                        workload.loss(model, rank, 1.0).backward()
                optimizer.train()
            workload.loss(model, rank, 1.0).backward()
            optimizer.step()
            optimizer.zero_grad()
            dist.barrier()
            return 0.0

        steps[kind] = step

    def over() -> bool:
        # The first process speaks for both: they must end at the same step.
        told = torch.tensor(int(time.monotonic() >= end))
        dist.broadcast(told, 0)
        return bool(told)

    factor, block = (MANY, BLOCK) if tuple(kinds) == CLOSE else (1, 1)
    found = interleaved(steps, factor * rounds, over=over, block=block)
    sent = {kind: _sent(step) for kind, step in steps.items()}
    return {
        kind: {
            "step": row["step"],
            "base_step": found["base"]["step"],
            "block": block,
            "parameters": parameters,
            "extra_bytes_sent": sent[kind] - sent["base"],
        }
        for kind, row in found.items()
    }


def _sent(step: Step) -> int:
    """Bytes of the tensors that a step averages or gathers."""
    with CollectiveCounter() as counter:
        step()
    return sum(counter.sizes.values())


if __name__ == "__main__":
    measured = _measure(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    if dist.get_rank() == 0:
        print(json.dumps(measured))
    let_gloo_finish()
    dist.destroy_process_group()
