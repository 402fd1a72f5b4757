"""What one step makes a GPU wait for: kernels, synchronizations, copies to the host, idle time.

`python -m hf_extrap.benchmarks.device_gaps WORKLOAD [METHOD ...] --output FILE.json`. The benchmark itself synchronizes
around every pass, for the base as for the others: what counts is the difference to `base`.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from hf_extrap.results import write_json

from .methods import make
from .workloads import WORKLOADS, Made

WARM_UPS, STEPS = 5, 5
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


def busy(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Time that is covered by any of the intervals, and the time from the first begin to the last end."""
    ordered = sorted(intervals)
    if not ordered:
        return 0.0, 0.0
    covered, reached = 0.0, ordered[0][0]
    for begin, end in ordered:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered, reached - ordered[0][0]


def profile_step(workload: str, method: str, device: torch.device) -> dict[str, Any]:
    """One step's kernels, waits, copies to the host, and milliseconds of the device; medians over some steps."""
    step, optimizer = make(method, Made(WORKLOADS[workload], device))
    for _ in range(WARM_UPS):
        step()
    rows = []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(STEPS):
        with torch.profiler.profile(activities=activities) as profiler:
            step()
        events = profiler.events()
        on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        calls = Counter(e.name for e in events if e.device_type == torch.autograd.DeviceType.CPU)
        covered, span = busy((e.time_range.start, e.time_range.end) for e in on_device)
        rows.append(
            {
                "kernels": sum(not e.name.startswith(("Mem", "mem")) for e in on_device),
                "synchronizations": sum(calls[name] for name in WAITS),
                "copies to the host": sum("DtoH" in e.name for e in on_device),
                "busy, ms": covered / 1e3,
                "idle, ms": (span - covered) / 1e3,
            }
        )
    del step, optimizer
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    """Profile the methods and print a table."""
    parser = argparse.ArgumentParser("device_gaps", description=__doc__)
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("methods", nargs="*", default=["base", "none", "extrap-past", "past-update", "optimistic"])
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    known = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {method: profile_step(known.workload, method, device) for method in known.methods}
    if known.output:
        write_json(known.output, {"workload": known.workload, "methods": found})
    rows = [{"method": name, **row} for name, row in found.items()]
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
