"""The table and the figure of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from tabulate import tabulate

from hf_extrap.recipes.run_folder import write_text
from hf_extrap.training.figures import COLOURS

from .timing import ratio, spread
from .workloads import WORKLOADS

OTHERS = {
    "trainer": "stock Trainer (base) and ExtrapTrainer, LSTM 1 × 128, 16 × 32 tokens",
    "processes": "DistributedDataParallel (base) and extrapolation, two processes, the LSTM of `lstm`",
}


def write_report(content: Mapping[str, Any], folder: Path) -> None:
    """Write `bench.md` and `bench.png` from the content of `bench.json`."""
    write_text(folder / "bench.md", table(content))
    rows = {}
    for name, found in content["results"].items():
        measured = {method: row for method, row in found.items() if "step" in row and method != "base"}
        if measured and name in WORKLOADS and not WORKLOADS[name].flat:
            rows[name] = measured
    if rows:
        draw(rows, folder / "bench.png")


def table(content: Mapping[str, Any]) -> str:
    """Markdown tables of every workload: time as a ratio to the base in the same rounds."""
    machine, bandwidth = content["machine"], content["copy_bandwidth"]
    parts = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; a copy moves {bandwidth / 1e9:.1f} GB/s, read and written.",
        "Median of interleaved rounds (interquartile range); ratio to the base in the same rounds, with its 95 % "
        "bootstrap interval. Rounds: the requested number, fewer where time ended, more for cheap steps; each of one "
        "step, or the median of several consecutive ones. Optimizer: time outside of the passes; for a flat list it "
        "includes the pass that hands given gradients to hooks and parameters. Moves: reads and writes of all "
        "parameters; the floor is the least that the scheme needs, at the bandwidth of a copy; at the floor: what the "
        "moves in addition to the base's would add to its step.",
    ]
    for name, found in content["results"].items():
        parts.append(f"### {name}: {_title(name, machine['precision'])}")
        flat = name in WORKLOADS and WORKLOADS[name].flat
        own = found.get("base", {}).get("floor", 0)
        rows = [_cells(method, row, bandwidth, flat, own) for method, row in found.items()]
        parts.append(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    if lines := growth(content):
        parts += ["### Growth: the optimizer's time as a line through all flat lists", lines]
    return "\n\n".join(parts) + "\n"


def _title(name: str, precision: str) -> str:
    trained = WORKLOADS.get("lstm" if name == "processes" else name)
    autocasts = trained is not None and trained.autocasts
    return f"{OTHERS.get(name) or WORKLOADS[name].title}, {precision if autocasts else 'float32'}"


def _cells(method: str, row: Mapping[str, Any], bandwidth: float, flat: bool, own: float) -> dict[str, str]:
    if "skipped" in row:
        return {"method": f"`{method}`", "ratio to base": row["skipped"]}
    which = "optimizer" if flat else "step"
    middle, low, high = ratio(row[which], row[f"base_{which}"])
    cells = {"method": f"`{method}`", "ratio to base": "1"}
    if method != "base":
        cells["ratio to base"] = f"{middle:.3f} ({low:.3f} … {high:.3f})"
    block = row.get("block", 1)
    cells["rounds"] = f"{len(row[which])} × {block} steps" if block > 1 else str(len(row[which]))
    if not flat:
        cells["step, ms"] = _milliseconds(row["step"])
    if "optimizer" in row:
        cells["optimizer, ms"] = _milliseconds(row["optimizer"])
        cells["peak, MB"] = f"{row['peak_bytes'] / 1e6:.1f}"
    if "extra_bytes_sent" in row:
        cells["sent in addition, MB"] = f"{row['extra_bytes_sent'] / 1e6:.1f}"
    if "floor" in row:
        cells["moves (floor)"] = f"{row['moved']:g} ({row['floor']:g})"
        seconds = 4 * row["parameters"] / bandwidth
        if flat:
            cells["time ÷ floor"] = f"{spread(row['optimizer'])[0] / (row['floor'] * seconds):.2f}"
        else:
            cells["at the floor"] = f"+{(row['floor'] - own) * seconds / spread(row['base_step'])[0]:.1%}"
    return cells


def growth(content: Mapping[str, Any]) -> str:
    """The optimizer's time as a straight line, a · parameters + b · tensors, through all flat lists, in Markdown."""
    flat = [found for name, found in content["results"].items() if name in WORKLOADS and WORKLOADS[name].flat]
    rows = []
    for method in dict.fromkeys(method for results in flat for method in results):
        found = [results[method] for results in flat if "optimizer" in results.get(method, {})]
        if len(found) < 3:
            continue
        sizes = np.array([[row["parameters"], row["tensors"]] for row in found], float)
        seconds = np.array([spread(row["optimizer"])[0] for row in found])
        # Relative errors, so that every list has the same weight.
        slopes, _ = nnls(sizes / seconds[:, None], np.ones(len(found)))
        off = np.abs(sizes @ slopes / seconds - 1).max()
        rows.append([f"`{method}`", f"{1e9 * slopes[0]:.2f}", f"{1e6 * slopes[1]:.1f}", f"{100 * off:.0f} %"])
    head = ["method", "ns a parameter", "µs a tensor", "farthest from the line"]
    return tabulate(rows, head, tablefmt="github", disable_numparse=True) if rows else ""


def _milliseconds(seconds: Sequence[float]) -> str:
    middle, width = spread(seconds)
    return f"{1e3 * middle:.2f} ({1e3 * width:.2f})"


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the ratio of each method's step time to the base's, with its interval, one panel per workload."""
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(method for found in rows.values() for method in found))
    figure = Figure(figsize=(3.2 * len(rows) + 2.2, 0.28 * len(methods) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for panel, (name, found), colour in zip(panels, rows.items(), COLOURS, strict=False):
        for method, row in found.items():
            place, (middle, low, high) = methods.index(method), ratio(row["step"], row["base_step"])
            panel.barh(place, middle - 1, left=1, color=colour, alpha=0.6, xerr=[[middle - low], [high - middle]])
            panel.annotate(f"{middle:.2f}", (max(middle, high), place), (3, 0), textcoords="offset points", va="center")
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(title=name, xlabel="step time ÷ base")
        panel.margins(x=0.18)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)
