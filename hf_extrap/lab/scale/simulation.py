"""Virtual workers on one device: seconds and memory of a step as their number grows, each cell in a fresh process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated

from .counting import held_bytes

WORKERS = (1, 4, 16, 64, 256)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "past-update": ("past-update", {}),
    "extrap-past": ("extrap-past", {}),
    "extrap-past, bfloat16": ("extrap-past", {"direction_dtype": "bfloat16"}),
    "extrap-past, on the host": ("extrap-past", {"direction_device": "cpu"}),
    "extrap": ("extrap", {}),
    "extrap, bfloat16": ("extrap", {"direction_dtype": "bfloat16"}),
    "extrap, on the host": ("extrap", {"direction_device": "cpu"}),
}
"""Preset and fields by name; without a suffix, in float32 beside the parameters."""


def measure(variant: str, workers: int, steps: int = 3, width: int = 512, batch: int = 8) -> dict[str, Any]:
    """Run one cell twice, in processes of its own, on one thread: for the time and for the memory.

    Args:
        variant: a name in `VARIANTS`.
        workers: K virtual workers, one micro-batch each.
        steps: measured ones, after two that fill the memory.
        width: of the four layers of a perceptron, whose directions are as large as itself.
        batch: samples of a micro-batch.

    Returns:
        `parameters`; `seconds` of a step, the median; `peak_bytes`, the growth of the process's largest resident set
        from before the model was made to the end of the last step, with an allocator that hands freed memory back at
        once (which costs time); `default_peak_bytes`, the same of the process that was timed; `held`, what the
        optimizer holds at the last y, see `held_bytes`.

    Raises:
        RuntimeError: if the process fails.
    """
    command = [
        sys.executable,
        "-m",
        "hf_extrap.lab.scale.simulation",
        variant,
        *map(str, (workers, steps, width, batch)),
    ]
    timed, spared = (_in_process(command, environment) for environment in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"}))
    return {**timed, "peak_bytes": spared["peak_bytes"], "default_peak_bytes": timed["peak_bytes"]}


def _in_process(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[3:])} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _run(variant: str, workers: int, steps: int, width: int, batch: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A step of a tiny model, so that what libraries set up is not counted.
    tiny = nn.Linear(2, 2)
    tiny(torch.randn(2, 2)).sum().backward()
    torch.optim.AdamW(tiny.parameters()).step()
    # The peak of importing torch is no part of the step's.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())))
    preset, fields = VARIANTS[variant]
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = Extrapolated(base, ExtrapConfig.preset(preset, **fields), virtual_workers=workers)
    inputs = torch.randn(workers, batch, width)
    seconds, held = [], {}
    for step in range(2 + steps):
        started = time.perf_counter()
        for worker in range(workers):
            if optimizer.wants_probe:
                with optimizer.probing(worker=worker) as backward:
                    backward(model(inputs[worker]).square().mean() / workers)
            optimizer.train(worker=worker)
            (model(inputs[worker]).square().mean() / workers).backward()
        elapsed = time.perf_counter() - started
        if step == 1 + steps:
            held = held_bytes(optimizer)
        started = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(elapsed + time.perf_counter() - started)
    return {
        "variant": variant,
        "workers": workers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": statistics.median(seconds[2:]),
        "peak_bytes": _peak() - before,
        "held": held,
    }


def _peak() -> int:
    """Bytes of the largest resident set since the last reset, of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], *(int(word) for word in sys.argv[2:]))))
