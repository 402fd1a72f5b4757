"""Table and figure of the rows of a study."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from hf_extrap.recipes.run_folder import read_json, write_text
from hf_extrap.training.figures import COLOURS, MARKERS

Rows = Sequence[Mapping[str, Any]]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_report(folder: Path) -> str:
    """Write `report.md` and `figure.png` from `rows.jsonl` and `plan.json`; returns the Markdown."""
    rows, plan = read_rows(folder / "rows.jsonl"), read_json(folder / "plan.json")
    tuning = _grouped([row for row in rows if row["stage"] == "a"], lambda row: row["name"])
    finals = _grouped([r for r in rows if r["stage"] == "b"], lambda row: f"{row['name']}, rate {row['rate']:g}")
    rates = sorted({row["rate"] for found in tuning.values() for row in found})
    parts = [
        f"{plan['device']}, torch {plan['torch']}: {plan['images_per_second']:,.0f} images/s in {plan['slots']} "
        f"concurrent runs; {len(rows)} runs.",
        f"### First stage: {plan['epochs']} epochs, one seed; validation accuracy (%) by peak learning rate",
        _table([_tuning_cells(name, found, rates) for name, found in tuning.items()]),
        f"### Second stage: {plan['long_epochs']} epochs at the best rate, other seeds; mean ± standard deviation (%)",
        _table([_final_cells(name, found) for name, found in finals.items()]),
    ]
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "report.md", text)
    if rows:
        _draw(tuning, finals, rates, folder / "figure.png")
    return text


def _grouped(rows: Rows, key: Any) -> dict[str, Rows]:
    """Rows by key, in the order in which the keys came first."""
    first = {name: place for place, name in reversed(list(enumerate(map(key, rows))))}
    ordered = sorted(rows, key=lambda row: first[key(row)])
    return {name: list(found) for name, found in groupby(ordered, key)}


def _table(cells: Sequence[Mapping[str, str]]) -> str:
    return tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)


def _tuning_cells(name: str, found: Rows, rates: Sequence[float]) -> dict[str, str]:
    shown = {row["rate"]: "diverged" if row["diverged"] else f"{row['validation']:.2f}" for row in found}
    best = max(found, key=lambda row: row["validation"] if not row["diverged"] else 0.0)
    by_rate = {f"{rate:g}": shown.get(rate, "–") for rate in rates}
    return {"method": name, **by_rate, "test, at the best validation": f"{best['test']:.2f}"}


def _final_cells(name: str, found: Rows) -> dict[str, str]:
    cells = {"method": name, "batch": f"{found[0]['batch']:,}", "seeds": str(len(found))}
    for split in ("validation", "test"):
        values = [row[split] for row in found]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells[split] = f"{statistics.mean(values):.2f}{deviation}"
    return cells


def _draw(tuning: Mapping[str, Rows], finals: Mapping[str, Rows], rates: Sequence[float], path: Path) -> None:
    """Left: validation accuracy by peak learning rate, a line per method; right: test accuracy, a point per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 0.8))
    for place, (name, found) in enumerate(tuning.items()):
        points = sorted((row["rate"], row["validation"]) for row in found if not row["diverged"])
        colour, dash = COLOURS[place % len(COLOURS)], "--" if place >= len(COLOURS) else "-"
        marker = MARKERS[place % len(MARKERS)]
        left.plot(*zip(*points, strict=True), dash, color=colour, marker=marker, markersize=4, label=name)
    left.set_xscale("log", base=2)
    left.set_xticks(rates, [f"{rate:g}" for rate in rates])
    left.set(xlabel="peak learning rate", ylabel="validation accuracy (%)")
    left.set_title("First stage, one seed", loc="left", fontsize=11)
    left.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for place, found in enumerate(finals.values()):
        right.plot([row["test"] for row in found], [place] * len(found), "o", color=COLOURS[0], alpha=0.7)
    right.set_yticks(range(len(finals)), [name.replace(", ", ",\n") for name in finals], fontsize=8)
    right.invert_yaxis()
    right.margins(y=0.15)
    right.set_xlabel("test accuracy (%)")
    right.set_title("Second stage, one point per seed", loc="left", fontsize=11)
    for axes in (left, right):
        axes.grid(True, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
