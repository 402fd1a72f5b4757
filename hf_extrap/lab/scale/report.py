"""Tables and a figure of what extrapolation costs at scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .arithmetic import ENGINES, PRESETS, communication, memory, sent

NAMES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3, FSDP2", "hsdp": "HSDP"}


def plan_tables(parameters: int, ranks: tuple[int, ...], node: int = 8) -> str:
    """Markdown: GB sent by each rank in a step, and GB held, by engine, preset and number of ranks.

    A cell is what the engine has alone + what the preset adds; presets with the same cells share a row.
    """
    sends: dict[tuple[str, ...], list[str]] = {}
    holds: dict[tuple[str, ...], list[str]] = {}
    for engine in ENGINES:
        for preset in PRESETS:
            try:
                traffic = [communication(engine, preset, parameters, k, node=node) for k in ranks]
            except ValueError:
                sent_cells = held_cells = ["refused"] * len(ranks)
            else:
                sent_cells = [_sum(sent(base), sent(extra)) for base, extra in traffic]
                held = [memory(engine, preset, parameters, k, node=node) for k in ranks]
                added = [h["x"] + h["directions"] for h in held]
                held_cells = [_sum(sum(h.values()) - more, more) for h, more in zip(held, added, strict=True)]
            sends.setdefault((NAMES[engine], *sent_cells), []).append(f"`{preset}`")
            holds.setdefault((NAMES[engine], *held_cells), []).append(f"`{preset}`")
    head = [
        _row("engine", "preset", *(f"K = {k:,}" for k in ranks)),
        _row("---", "---", *["---:"] * len(ranks)),
    ]
    tables = [
        [*head, *(_row(engine, ", ".join(presets), *cells) for (engine, *cells), presets in rows.items())]
        for rows in (sends, holds)
    ]
    return "\n".join(["GB sent a rank and step:", "", *tables[0], "", "GB held a rank:", "", *tables[1]])


def simulation_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds and MB by variant and K, and straight lines through them, weighted by 1 / value²."""
    workers = sorted({row["workers"] for row in rows})
    table = [
        _row("variant", *(f"K = {k}" for k in workers), "line", "held", "on the host"),
        _row("---", *["---:"] * (len(workers) + 3)),
    ]
    seconds, peaks = list(table), list(table)
    seconds[0] = _row("s a step", *(f"K = {k}" for k in workers), "ms + ms · K")
    seconds[1] = _row("---", *["---:"] * (len(workers) + 1))
    peaks[0] = _row("peak, MB", *(f"K = {k}" for k in workers), "MB + MB · K", "held", "on the host")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["workers"])
        times, sizes = [row["seconds"] for row in own], [row["peak_bytes"] / 1e6 for row in own]
        a, b = line(workers, times)
        seconds.append(_row(variant, *(f"{t:.3f}" for t in times), f"{1e3 * a:.1f} + {1e3 * b:.2f} · K"))
        a, b = line(workers, sizes)
        held = own[-1]["held"]
        beside = (held["x"] + held["directions"]) / 1e6
        peaks.append(
            _row(
                variant,
                *(f"{s:,.0f}" for s in sizes),
                f"{a:.0f} + {b:.2f} · K",
                f"{beside:,.1f}",
                f"{held['host'] / 1e6:,.1f}",
            )
        )
    return "\n".join([*seconds, "", *peaks])


def line(x: list[int], y: list[float]) -> tuple[float, float]:
    """Intercept and slope of least relative squares."""
    slope, intercept = np.polyfit(x, y, 1, w=1 / np.asarray(y))
    return float(intercept), float(slope)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A figure of seconds, peak memory and what lies beside the parameters against K, on logarithmic axes, with the
    fitted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = left, middle, right = figure.subplots(1, 3)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for index, variant in enumerate(variants):
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["workers"])
        workers = [row["workers"] for row in own]
        dashes = {"bfloat16": (4, 2), "host": (1, 1.5)}
        style = next((dash for word, dash in dashes.items() if word in variant), (1, 0))
        color = f"C{['none', 'past-update', 'extrap-past', 'extrap'].index(variant.split(',')[0])}"
        fine = np.geomspace(min(workers), max(workers), 100)
        for axis, values in (
            (left, [row["seconds"] for row in own]),
            (middle, [row["peak_bytes"] / 1e6 for row in own]),
            (right, [(row["held"]["x"] + row["held"]["directions"]) / 1e6 for row in own]),
        ):
            if not any(values):
                continue
            a, b = line(workers, values)
            axis.plot(fine, a + b * fine, color=color, dashes=style, linewidth=1.4, label=variant)
            axis.plot(workers, values, "os^D"[index % 4], color=color, markersize=4)
    labels = ("seconds a step", "peak memory of the process, MB", "x and directions beside the parameters, MB")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="virtual workers K", ylabel=label)
        axis.set_xticks(workers, [str(k) for k in workers])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _sum(own: float, added: float) -> str:
    return f"{own / 1e9:.3g}" + (f" + {added / 1e9:.3g}" if added else "")
