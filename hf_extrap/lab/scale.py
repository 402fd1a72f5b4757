"""The cost of extrapolation at scale: tables of the formulas, and virtual workers measured on one device.

`python -m hf_extrap.lab.scale plan` prints the formulas' tables; `simulate` measures, and writes JSON and a figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated

from .cost import ENGINES, PRESETS, communication, memory, sent
from .counting import held_bytes

PLACES = {"": {}, ", bfloat16": {"direction_dtype": "bfloat16"}, ", on the host": {"direction_device": "cpu"}}
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "none": ("none", {}),
    "past-update": ("past-update", {}),
    **{preset + place: (preset, fields) for preset in ("extrap-past", "extrap") for place, fields in PLACES.items()},
}
"""Preset and fields of each measured variant; without a suffix, directions are float32 on the parameters' device."""


def plan_tables(parameters: int, ranks: Sequence[int], node: int = 8) -> str:
    """Markdown tables of the GB that each rank sends in a step, and holds, by engine, preset and number of ranks.

    A cell is what the engine has alone + what the preset adds; presets with the same cells share a row.
    """

    def cells(engine: str, preset: str, k: int) -> tuple[str, ...]:
        try:
            base, extra = communication(engine, preset, parameters, k, node=node)
        except ValueError:
            return "refused", "refused"
        held = memory(engine, preset, parameters, k, node=node)
        added = held["x"] + held["directions"]
        pairs = ((sent(base), sent(extra)), (sum(held.values()) - added, added))
        return tuple(f"{own / 1e9:.3g}" + (f" + {more / 1e9:.3g}" if more else "") for own, more in pairs)

    tables: tuple[dict[tuple[str, ...], list[str]], ...] = ({}, {})
    for engine, preset in itertools.product(ENGINES, PRESETS):
        columns = [cells(engine, preset, k) for k in ranks]
        for table, row in zip(tables, zip(*columns, strict=True), strict=True):
            table.setdefault((ENGINES[engine], *row), []).append(f"`{preset}`")
    head = ["engine", "preset", *(f"K = {k:,}" for k in ranks)]
    parts = []
    for title, table in zip(("GB sent per rank and step:", "GB held per rank:"), tables, strict=True):
        rows = [[name, ", ".join(presets), *row] for (name, *row), presets in table.items()]
        parts += [title, tabulate(rows, head, tablefmt="pipe", disable_numparse=True)]
    return "\n\n".join(parts)


def measure(variant: str, workers: int, steps: int = 3, width: int = 512, batch: int = 8) -> dict[str, Any]:
    """Run one cell twice in separate single-threaded processes, for the time and for the memory.

    Args:
        variant: a name in `VARIANTS`.
        workers: K virtual workers, one micro-batch each.
        steps: measured steps, after two that fill the buffers.
        width: of the four layers of a perceptron, whose directions are as large as itself.
        batch: samples of a micro-batch.

    Returns:
        `parameters`; `seconds` of a step, the median; `peak_bytes`, the growth of the process's largest resident set
        from before the model was made to the end of the last step, with an allocator that returns freed memory at once
        (which costs time); `default_peak_bytes`, the same of the timed process; `held`, of `held_bytes` at the last y.
    """
    timed, spared = (
        _in_process(["cell", variant, *map(str, (workers, steps, width, batch))], environment)
        for environment in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"})
    )
    return {**timed, "peak_bytes": spared["peak_bytes"], "default_peak_bytes": timed["peak_bytes"]}


def _in_process(words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "hf_extrap.lab.scale", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _run_cell(variant: str, workers: int, steps: int, width: int, batch: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A step of a tiny model, so that the first use of the libraries is not counted.
    tiny = nn.Linear(2, 2)
    tiny(torch.randn(2, 2)).sum().backward()
    torch.optim.AdamW(tiny.parameters()).step()
    # Reset the peak, which importing torch has set.
    Path("/proc/self/clear_refs").write_text("5")
    peak_before = _peak()
    inputs = torch.randn(workers, batch, width)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())))
    preset, fields = VARIANTS[variant]
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = Extrapolated(base, ExtrapConfig.preset(preset, **fields), virtual_workers=workers)
    seconds, held = [], dict[str, int]()
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
        "peak_bytes": _peak() - peak_before,
        "held": held,
    }


def _peak() -> int:
    """Bytes of this process's largest resident set since the last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of the line with the least squared relative errors."""
    slope, intercept = np.polyfit(x, y, 1, w=1 / np.asarray(y))
    return float(intercept), float(slope)


def simulation_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown tables of seconds and MB by variant and K, with fitted lines, and MB held at the largest K."""
    seconds, peaks = [], []
    for variant, own in pd.DataFrame(rows).sort_values("workers").groupby("variant", sort=False):
        heads, peak, held = [f"K = {k}" for k in own["workers"]], own["peak_bytes"] / 1e6, own["held"].iloc[-1]
        a, b = line(own["workers"], 1e3 * own["seconds"])
        seconds.append([variant, *own["seconds"].map("{:.3f}".format), f"{a:.1f} + {b:.2f} · K"])
        a, b = line(own["workers"], peak)
        places = (f"{size / 1e6:,.1f}" for size in (held["x"] + held["directions"], held["host"]))
        peaks.append([variant, *peak.map("{:,.0f}".format), f"{a:.0f} + {b:.2f} · K", *places])
    tables = {
        ("s a step", *heads, "ms + ms · K"): seconds,
        ("peak, MB", *heads, "MB + MB · K", "held", "on the host"): peaks,
    }
    return "\n\n".join(tabulate(table, head, "pipe", disable_numparse=True) for head, table in tables.items())


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw seconds and peak memory against K on logarithmic axes, with the fitted lines."""
    from hf_extrap.lab.figures import add_legend, finish, make_panels

    figure, panels = make_panels(2, height=3.8)
    presets, places = list(dict.fromkeys(preset for preset, _ in VARIANTS.values())), list(PLACES)
    for variant, own in pd.DataFrame(rows).sort_values("workers").groupby("variant", sort=False):
        preset = VARIANTS[str(variant)][0]
        color, style = f"C{presets.index(preset)}", "- -- :".split()[places.index(str(variant).removeprefix(preset))]
        for axes, values in zip(panels, (own["seconds"], own["peak_bytes"] / 1e6), strict=True):
            a, b = line(own["workers"], values)
            fine = np.geomspace(own["workers"].min(), own["workers"].max(), 100)
            axes.plot(fine, a + b * fine, style, color=color, linewidth=1.4, label=variant)
            axes.plot(own["workers"], values, "o", color=color, markersize=4)
    for axes, label in zip(panels, ("seconds a step", "peak memory of the process, MB"), strict=True):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(own["workers"], [str(k) for k in own["workers"]])
        axes.minorticks_off()
        finish(axes, across="virtual workers K", up=label)
    add_legend(figure, panels)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print tables; `simulate` also writes its numbers and a figure."""
    parser = argparse.ArgumentParser("python -m hf_extrap.lab.scale")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="bytes sent and held, by formulas")
    plan.add_argument("--parameters", type=int, default=1_500_000_000)
    plan.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    plan.add_argument("--node", type=int, default=8, help="ranks that share one copy of the weights under HSDP")
    simulate = commands.add_parser("simulate", help="seconds and memory of virtual workers on this machine's CPU")
    simulate.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    simulate.add_argument("--width", type=int, default=512)
    simulate.add_argument("--json", type=Path, default=Path("docs/scale.json"))
    simulate.add_argument("--figure", type=Path, default=Path("docs/figures/scale_virtual_workers.png"))
    cell = commands.add_parser("cell", help="one cell of a simulation, as JSON")
    cell.add_argument("variant", choices=VARIANTS)
    cell.add_argument("numbers", type=int, nargs=4, metavar="N", help="workers, steps, width, batch")
    given = parser.parse_args()
    if given.command == "plan":
        print(plan_tables(given.parameters, given.ranks, given.node))
    elif given.command == "cell":
        print(json.dumps(_run_cell(given.variant, *given.numbers)))
    else:
        rows = [measure(variant, k, width=given.width) for k in tqdm(given.workers) for variant in VARIANTS]
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
        draw(rows, given.figure)
        print(simulation_tables(rows))


if __name__ == "__main__":
    main()
