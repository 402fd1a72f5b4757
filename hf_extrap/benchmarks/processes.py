"""Two processes: extrapolation beside plain DistributedDataParallel, interleaved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.processes import let_gloo_finish
from hf_extrap.scale.counting import CollectiveCounter

from .methods import Step
from .timing import interleaved
from .workloads import WORKLOADS, Made

KINDS = ("base", "none", "extrap-past", "past-update", "extrap", "extragradient")


def run(rounds: int, name: str = "lstm") -> dict[str, Any]:
    """Seconds of a step in two processes of one thread each, with one worker each, and the bytes that it sends more.

    Raises:
        RuntimeError: if the processes fail, with the end of what they said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", __name__]
    done = subprocess.run(
        [*command, str(rounds), name], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"the benchmark of two processes failed: {done.stderr[-500:]}")
    rows: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _measure(rounds: int, name: str) -> dict[str, Any]:
    dist.init_process_group("gloo")
    workload, rank = WORKLOADS[name], dist.get_rank()
    steps, parameters = {}, 0
    for kind in KINDS:
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
    found = interleaved(steps, rounds)
    base_step, sent = found["base"]["step"], {kind: _sent(step) for kind, step in steps.items()}
    return {
        kind: {
            "step": row["step"],
            "base_step": base_step,
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
    measured = _measure(int(sys.argv[1]), sys.argv[2])
    if dist.get_rank() == 0:
        print(json.dumps(measured))
    let_gloo_finish()
    dist.destroy_process_group()
