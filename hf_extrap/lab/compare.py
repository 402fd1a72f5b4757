"""Presets against each other: every preset × learning rate × seed is a run, on the same data order for each seed."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from rich.console import Console

from hf_extrap.lab.summary import COLUMNS, explanation, gradients_per_step, summarise, table_rows
from hf_extrap.optim.config import PRESETS, ExtrapConfig
from hf_extrap.recipes.configuration import Configuration, resolve
from hf_extrap.recipes.figures import draw_comparison
from hf_extrap.recipes.run import run
from hf_extrap.recipes.run_folder import RunFolder, different_fields, versions, write_json
from hf_extrap.recipes.tables import make_table

TABLE_FILE, NUMBERS_FILE, FIGURE_FILE = "compare.md", "compare.json", "compare.png"
T = TypeVar("T")


@dataclass(frozen=True)
class Variant:
    """A preset with fields of its own, written `name` or `name:field=value:field=value`."""

    label: str

    @property
    def words(self) -> list[str]:
        """Command-line words that choose it."""
        name, *fields = self.label.split(":")
        if name not in PRESETS:
            raise ValueError(f"--presets: {name!r} is no preset; allowed: {', '.join(PRESETS)}.")
        if bad := [item for item in fields if "=" not in item]:
            raise ValueError(f"--presets: {bad[0]!r} in {self.label!r} is not field=value.")
        return [f"--extrap={name}", *(f"--extrap_{item}" for item in fields)]


def parse_list(name: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The values of a comma-separated option.

    Raises:
        ValueError: it is empty, holds a value twice, or one that is not of the kind.
    """
    try:
        values = [kind(item.strip()) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise ValueError(f"--{name} is {text!r}; allowed: {kind.__name__} values separated by commas.") from error
    if not values or len(set(values)) < len(values):
        raise ValueError(f"--{name} is {text!r}; allowed: one or more different values separated by commas.")
    return values


def compare(
    config: str | Path | None,
    words: Sequence[str],
    presets: Sequence[str],
    seeds: Sequence[int],
    learning_rates: Sequence[float] | None = None,
    target: float | None = None,
    output_dir: str | Path | None = None,
    command: str = "hf-extrap compare",
) -> pd.DataFrame:
    """Run the grid, print its table, and write compare.md, compare.json and compare.png.

    A cell that is finished is read back, one that was cut off goes on from its last checkpoint.

    Args:
        config: YAML file, or None for the task's defaults.
        words: `--field value …` for every run.
        presets: names of presets, each with fields of its own if wanted: `extrap:step_ratio=0.25`.
        seeds: a seed sets the initial weights, the data order and all noise.
        learning_rates: each preset is judged at its best one, by validation; None: the configuration's.
        target: value of the metric for "steps to target"; None: the worst preset's final one.
        output_dir: default `runs/compare-<config>`.
        command: what the user typed, for the record.

    Returns:
        One row a preset: the table that is printed.
    """
    for name in ("extrap", "seed", "learning_rate"):
        if any(word == f"--{name}" or word.startswith(f"--{name}=") for word in words):
            plural = {"extrap": "presets"}.get(name, f"{name}s")
            raise ValueError(f"--{name}: a comparison sets it for each run; use --{plural}.")
    root = Path(output_dir or Path("runs") / f"compare-{Path(config).stem if config else 'default'}")
    rates: Sequence[float | None] = learning_rates or [None]
    settings = [(preset, rate, seed) for preset in presets for rate in rates for seed in seeds]
    # Every cell is resolved before the first one runs: a mistake in the last must not cost the others' time.
    cells = [_resolve_cell(config, words, root, *setting) for setting in settings]
    first = os.environ.get("RANK", "0") == "0"
    results = []
    for number, ((preset, _, seed), cell) in enumerate(zip(settings, cells, strict=True), 1):
        began = time.perf_counter()
        metrics, rows, how = _run_cell(cell, command)
        rate = cell.training_arguments.learning_rate
        value = metrics["eval"].get(f"eval_{metrics['metric']}")
        if first:
            shown = "diverged" if metrics["status"] == "diverged" else f"{metrics['metric']} {value:.4g}"
            seconds = time.perf_counter() - began
            print(
                f"[{number}/{len(cells)}] {preset}, lr {rate:g}, seed {seed}: {shown} ({how}, {seconds:.0f} s)",
                flush=True,
            )
        results.append({"preset": preset, "learning_rate": rate, "seed": seed, "metrics": metrics, "rows": rows})
    frame = _frame(results)
    table, best, target = summarise(frame, target)
    if first:
        _write(root, table, frame, best, target, command)
        _print(root, table, frame, target)
    return table


def _resolve_cell(
    config: str | Path | None, words: Sequence[str], root: Path, preset: str, rate: float | None, seed: int
) -> Configuration:
    own = [*Variant(preset).words, f"--seed={seed}"]
    if rate is not None:
        own.append(f"--learning_rate={rate}")
    name = preset.replace(":", "_").replace("=", "-")
    folder = root / name / ("lr-default" if rate is None else f"lr-{rate:g}") / f"seed-{seed}"
    return resolve(config, [*words, *own, f"--output_dir={folder}"])


def _run_cell(cell: Configuration, command: str) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    folder = RunFolder(Path(str(cell.training_arguments.output_dir)))
    if folder.is_finished:
        metrics = folder.read_metrics()
        if differing := different_fields(metrics["arguments"], cell.given):
            raise ValueError(
                f"{folder.path} holds another run: its {differing[0]} is {metrics['arguments'].get(differing[0])!r}, "
                f"not {cell.given.get(differing[0])!r}; give another --output_dir, or delete the folder."
            )
        return metrics, folder.read_history(), "read back"
    how = "trained"
    if folder.last_checkpoint() is not None:
        cell.training_arguments.resume_from_checkpoint = "true"
        how = "resumed"
    run(cell, command)
    gc.collect()
    # As a later call would read them: numbers that are not finite are null.
    return folder.read_metrics(), folder.read_history(), how


def _frame(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for result in results:
        metrics = result["metrics"]
        name = metrics["metric"]
        rows.append(
            {
                **{key: result[key] for key in ("preset", "learning_rate", "seed")},
                "metric": name,
                "greater_is_better": metrics["greater_is_better"],
                "validation": metrics["eval"].get(f"eval_{name}"),
                "test": (metrics["test"] or {}).get(f"test_{name}"),
                "seconds_per_step": metrics["seconds_per_step"],
                "steps": metrics["steps"],
                "gradients_per_step": gradients_per_step(ExtrapConfig.from_dict(metrics["extrap"]), metrics["steps"]),
                "diverged": metrics["status"] == "diverged",
                "history": result["rows"],
            }
        )
    numbers = ["validation", "test", "seconds_per_step"]
    frame = pd.DataFrame(rows)
    return frame.astype(dict.fromkeys(numbers, float))


def _write(
    root: Path, table: pd.DataFrame, frame: pd.DataFrame, best: dict[str, float], target: float | None, command: str
) -> None:
    metric = str(frame["metric"].iloc[0])
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in table_rows(table)]
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = "\n".join([*lines, "", explanation(frame, target), "", f"Command: `{command}`. Versions: {used}.", ""])
    write_json(
        root / NUMBERS_FILE,
        {
            "metric": metric,
            "target": target,
            "table": table.to_dict("records"),
            "runs": frame.drop(columns="history").to_dict("records"),
            "command": command,
            "versions": versions(),
        },
    )
    (root / TABLE_FILE).write_text(text, encoding="utf-8")
    lines_drawn = {
        preset: list(frame[(frame.preset == preset) & (frame.learning_rate == rate)]["history"])
        for preset, rate in best.items()
    }
    finite = frame[~frame["diverged"]].groupby(["preset", "learning_rate"], sort=False)["validation"]
    points: dict[str, list[tuple[float, float, float]]] = {preset: [] for preset in best}
    for (preset, rate), values in finite:
        points[preset].append((rate, values.mean(), values.std(ddof=0)))
    draw_comparison(lines_drawn, metric, root / FIGURE_FILE, points, target)


def _print(root: Path, table: pd.DataFrame, frame: pd.DataFrame, target: float | None) -> None:
    console = Console()
    # Narrower than this the columns of numbers are folded beyond reading.
    console.width = max(console.width, 120)
    console.print()
    console.print(make_table(None, COLUMNS, table_rows(table)))
    console.print(explanation(frame, target), style="dim", soft_wrap=True)
    for name in (TABLE_FILE, NUMBERS_FILE, FIGURE_FILE):
        console.print(str(root / name), soft_wrap=True)
