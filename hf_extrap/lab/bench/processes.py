"""Extrapolation and plain DistributedDataParallel in two processes, interleaved."""

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
from hf_extrap.optim.distributed import let_gloo_finish
from hf_extrap.optim.extrapolated import Extrapolated

from .timing import MANY, interleaved
from .workloads import WORKLOADS, Made

CLOSE = ("base", "none", "extrap-past")
"""Methods that differ by a few per cent at most."""

GROUPS = (CLOSE, ("base", "past-update", "extrap", "extragradient"))
"""Methods that are interleaved with each other."""

BLOCK = 3
"""Consecutive steps of the methods in `CLOSE`, which run `MANY` times the rounds."""


def run(kinds: Sequence[str], rounds: int, end: float, name: str = "lstm") -> dict[str, Any]:
    """Seconds of a step in two single-threaded processes, and the bytes sent in addition to the base's.

    Args:
        kinds: one of `GROUPS`.
        rounds: requested number.
        end: time of `time.monotonic`, which all processes share; no step begins after it.
        name: of the workload.

    Raises:
        ValueError: if the processes fail, with their first error.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", __name__]
    words = [*command, name, str(rounds), str(end), *kinds]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(f"the benchmark of two processes failed: {_reason(done.stderr)}")
    rows: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _reason(said: str) -> str:
    """The first error that a process printed; torchrun's own error follows it."""
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
        # The first process decides for both, so that they end at the same step.
        told = torch.tensor(time.monotonic() >= end).int()
        dist.broadcast(told, 0)
        return bool(told)

    factor, block = (MANY, BLOCK) if tuple(kinds) == CLOSE else (1, 1)
    found = interleaved(steps, factor * rounds, over=over, block=block)
    sent = {}
    for kind, step in steps.items():
        with CollectiveCounter() as counter:
            step()
        sent[kind] = sum(counter.sizes.values())
    shared = {"block": block, "parameters": parameters, "base_step": found["base"]["step"] if found else []}
    return {
        kind: {"step": row["step"], "extra_bytes_sent": sent[kind] - sent["base"], **shared}
        for kind, row in found.items()
    }


if __name__ == "__main__":
    measured = _measure(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    if dist.get_rank() == 0:
        print(json.dumps(measured))
    let_gloo_finish()
    dist.destroy_process_group()
