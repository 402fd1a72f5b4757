"""`hf-extrap bench`: every method on every workload that fits; finished results are kept in one JSON file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from hf_extrap.lab.bench import processes, trainers
from hf_extrap.recipes.hardware import cpu_model
from hf_extrap.recipes.run_folder import read_json, write_json

from .floor import BASES, copy_bandwidth, floor_of, moved
from .methods import CONFIGS, EXTRA_ALL_REDUCES, METHODS, PEERS, NotInstalled, make
from .report import write_report
from .timing import WARM_UPS, interleaved, peak_bytes
from .workloads import WORKLOADS, Made, Workload, precision_of

LOOPS: dict[str, Any] = {"trainer": trainers, "processes": processes}
"""Benchmarks with their own loop, `run`, and methods, `GROUPS`."""

MODELS = ("lstm", "translation", "resnet", "trainer")
PARTS = {
    "cpu": (*MODELS, "processes", "flat-1e6-10", "flat-1e7-10", "flat-1e7-10000", "flat-1e8-10"),
    "gpu": (
        *("gpt2", "resnet-8192", "flat-1e7-10", "flat-1e7-10000", *MODELS),
        *("flat-1e8-10", "flat-1e8-10000", "flat-1e9-10"),
    ),
}
"""Workloads by part: those that two cores measure in about ten minutes, and those for a GPU."""


def bench(
    workloads: Sequence[str],
    methods: Sequence[str],
    rounds: int = 20,
    minutes: float | None = None,
    output_dir: str = "runs/bench",
    device: str | None = None,
) -> None:
    """Measure what `output_dir` does not hold yet, and write `bench.json`, `bench.md` and `bench.png` there.

    Args:
        workloads: names in `WORKLOADS` and `LOOPS`.
        methods: names in `METHODS`; `base` is always added.
        rounds: interleaved steps of each method.
        minutes: begin no step after this time; an interrupted measurement with fewer than `FEWEST` rounds is repeated
            by the next call.
        output_dir: folder to write to, and to continue from.
        device: `cpu` or `cuda`; default: the GPU if there is one.

    Raises:
        ValueError: for an unknown name, two processes that fail, or a folder with results of another machine, version
            or precision.
    """
    for kind, names, known in (("workload", workloads, (*WORKLOADS, *LOOPS)), ("method", methods, METHODS)):
        if wrong := [name for name in names if name not in known]:
            raise ValueError(f"{kind} is {wrong[0]!r}; allowed: {', '.join(known)}.")
    if rounds < 2:
        raise ValueError(f"rounds is {rounds}; allowed: a whole number >= 2.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder, end = Path(output_dir), time.monotonic() + 60 * (float("inf") if minutes is None else minutes)
    content = _start(folder / "bench.json", place)
    methods = ["base", *(name for name in methods if name != "base")]
    then = "give it more minutes"
    for name in workloads:
        found = content["results"].setdefault(name, {})
        loop = LOOPS.get(name)
        run = loop.run if loop else partial(measure, name, place)
        for group in _groups(name, methods, found):
            measured = run(group, rounds, end) if time.monotonic() < end else {}
            if not measured:
                _write(folder, content)
                print(f"Time is up before {name} is done; {then}.")
                return
            found |= {m: row for m, row in measured.items() if "step" not in found.get(m, {})}
            then = "the same command continues from here"
            _write(folder, content)
    _write(folder, content)
    print((folder / "bench.md").read_text(encoding="utf-8"))


def workloads_of(part: str | None, device: str | None = None) -> Sequence[str]:
    """The workloads of a part; default: the part for the device."""
    part = part or ("gpu" if (device or "cpu") != "cpu" or torch.cuda.is_available() else "cpu")
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; allowed: {', '.join(PARTS)}.")
    return PARTS[part]


def _groups(name: str, methods: Sequence[str], found: Mapping[str, Any]) -> list[Sequence[str]]:
    """What is left of a workload: methods that are interleaved with each other; in pairs with the base, if large."""
    if name in LOOPS:
        return [group for group in LOOPS[name].GROUPS if not set(group) <= set(found)]
    # Skipped methods are tried again: a peer may be installed by now, or memory free.
    todo = [m for m in methods if "step" not in found.get(m, {})]
    others = [m for m in todo if m != "base"]
    if WORKLOADS[name].bytes_each and others:
        return [["base", m] for m in others]
    return [["base", *others]] if todo else []


def measure(name: str, device: torch.device, methods: Sequence[str], rounds: int, end: float) -> dict[str, Any]:
    """One row per method, interleaved; empty if time ended too early."""
    workload = WORKLOADS[name]
    if reason := _too_large(workload, device, len(methods)):
        return {method: {"skipped": reason} for method in methods}

    def three_steps(method: str) -> Any:
        step, optimizer = make(method, Made(workload, device))
        for _ in range(3):
            step()
        return step, optimizer

    rows: dict[str, Any] = {}
    peaks = {}
    for method in methods:
        if time.monotonic() >= end:
            return {}
        try:
            peaks[method] = peak_bytes(device, partial(three_steps, method))
        except NotInstalled as missing:
            rows[method] = {"skipped": str(missing)}
    steps = {method: make(method, Made(workload, device))[0] for method in peaks}
    with tqdm(total=WARM_UPS + rounds, desc=f"{name}: {', '.join(steps)}"[:60], unit="round") as bar:
        seconds = interleaved(steps, rounds, bar.update, lambda: time.monotonic() >= end)
    if not seconds:
        return {}
    del steps
    sizes = [p.numel() for p in Made(workload, device).params]
    shared = {f"base_{key}": values for key, values in seconds["base"].items()}
    for method, found in seconds.items():
        rows[method] = {
            **found,
            **shared,
            "parameters": sum(sizes),
            "tensors": len(sizes),
            "peak_bytes": peaks[method],
            "extra_bytes_sent": 4 * sum(sizes) * EXTRA_ALL_REDUCES.get(method, 0),
            **_traffic(workload, method, device),
        }
        if method in PEERS:
            rows[method]["package"] = f"{PEERS[method]} {version(PEERS[method])}"
    return rows


def _traffic(workload: Workload, method: str, device: torch.device) -> dict[str, Any]:
    """Traffic in parameter sizes, at least and in fact, for methods with a formula."""
    own, config = BASES[workload.base], CONFIGS.get(method)
    if method == "base":
        return {"floor": own, "moved": own}
    if config is None or config.batch_fraction < 1:
        return {}
    swaps = device.type == "cpu" if config.swap is None else config.swap
    ours = moved(config, swaps, workload.workers)
    return {"floor": own + floor_of(config, workload.workers), "moved": own + ours}


def _too_large(workload: Workload, device: torch.device, methods: int) -> str | None:
    if workload.needs_gpu and device.type != "cuda":
        return "needs a GPU."
    needed = workload.bytes_each * methods
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return f"needs {needed / 1e9:.0f} GB, and {free / 1e9:.0f} are free." if needed > 0.8 * free else None


def _start(path: Path, device: torch.device) -> dict[str, Any]:
    """The results of an earlier call, or an empty file's content."""
    import transformers

    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": precision_of(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if not path.exists():
        return {"machine": machine, "copy_bandwidth": copy_bandwidth(device), "results": {}}
    content: dict[str, Any] = read_json(path)
    for name, now in machine.items():
        if (was := content["machine"].get(name)) != now:
            raise ValueError(
                f"{path} holds results of another machine or precision ({name} was {was!r} and is {now!r}); "
                "allowed: another output_dir."
            )
    # The fastest copy of all calls, because a busy machine would raise the floor.
    content["copy_bandwidth"] = max(content["copy_bandwidth"], copy_bandwidth(device))
    return content


def _write(folder: Path, content: dict[str, Any]) -> None:
    write_json(folder / "bench.json", content)
    write_report(content, folder)
