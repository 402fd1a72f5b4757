"""Table and figure of the rows of a study."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from hf_extrap.recipes.figures import COLOURS, MARKERS
from hf_extrap.recipes.run_folder import read_json, write_text

from .plan import spread

Rows = Sequence[Mapping[str, Any]]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_report(folder: Path) -> str:
    """Write `study.md` and `study.png` from `rows.jsonl` and `plan.json`; returns the Markdown."""
    rows, plan = read_rows(folder / "rows.jsonl"), read_json(folder / "plan.json")
    text = _table(rows, plan)
    write_text(folder / "study.md", text)
    if rows:
        _draw(rows, folder / "study.png")
    return text


def _table(rows: Rows, plan: Mapping[str, Any]) -> str:
    tuning = [row for row in rows if row["stage"] == "a"]
    rates = sorted({row["rate"] for row in tuning})
    lines = []
    for name, found in _by_name(tuning).items():
        by_rate = {row["rate"]: row for row in found}
        best = max(found, key=lambda row: row["validation"] if not row["diverged"] else 0.0)
        cells = {f"{rate:g}": _cell(by_rate.get(rate)) for rate in rates}
        lines.append({"method": name, **cells, "test at the best": f"{best['test']:.2f}"})
    finals = [
        {
            **{"method": name, "rate": found[0]["rate"], "batch": f"{found[0]['batch']:,}", "seeds": len(found)},
            **{"validation": spread([r["validation"] for r in found]), "test": spread([r["test"] for r in found])},
        }
        for name, found in _by_name([row for row in rows if row["stage"] == "b"]).items()
    ]
    table = {"headers": "keys", "tablefmt": "github", "disable_numparse": True}
    parts = [
        f"{plan['device']}, torch {plan['torch']}: {plan['images_per_second']:,.0f} images/s in {plan['slots']} "
        f"concurrent runs; {len(rows)} runs.",
        f"### Tuning: {plan['epochs']} epochs, validation accuracy in percent by peak rate, one seed",
        tabulate(lines, **table),
        f"### {plan['long_epochs']} epochs at the best rate, other seeds: mean ± standard deviation, percent",
        tabulate(finals, **table),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    return "diverged" if row["diverged"] else f"{row['validation']:.2f}"


def _by_name(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["name"]].append(row)
    return dict(found)


def _draw(rows: Rows, path: Path) -> None:
    """Left: test accuracy by peak rate, one line a method; right: the second stage, one point a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (name, found) in enumerate(_by_name([r for r in rows if r["stage"] == "a"]).items()):
        points = sorted((row["rate"], row["test"]) for row in found if not row["diverged"])
        style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place // 2 % len(MARKERS)]}
        dashes = "--" if place >= len(COLOURS) else "-"
        left.plot(*zip(*points, strict=True) if points else ([], []), dashes, label=name, markersize=4, **style)
    left.set_xscale("log", base=2)
    left.set_xlabel("peak learning rate")
    left.set_ylabel("test accuracy, %")
    left.set_title("Tuning, one seed")
    left.legend(fontsize=6)
    finals = _by_name([r for r in rows if r["stage"] == "b"])
    for place, found in enumerate(finals.values()):
        right.plot([row["test"] for row in found], [place] * len(found), "o", color=COLOURS[place % len(COLOURS)])
    right.set_yticks(range(len(finals)), list(finals), fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("test accuracy, %")
    right.set_title("Best rate, one point a seed")
    figure.savefig(path, dpi=150)
