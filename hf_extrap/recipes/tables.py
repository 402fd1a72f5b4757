"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_extrap.recipes.model_card import result_rows, training_rows
from hf_extrap.recipes.run_folder import CARD_FILE, METRICS_FILE
from hf_extrap.training.figures import CURVES_FILE, spoken


def print_run(metrics: Mapping[str, Any], output_dir: str | Path, console: Console | None = None) -> None:
    """Print the results, speed and files of a run."""
    console = console or Console()
    better = "higher is better" if metrics["greater_is_better"] else "lower is better"
    direction = metrics["extrap"]["direction"]
    what = "no extrapolation" if direction == "none" else f"{metrics['extrap']['scope']} {direction} extrapolation"
    console.print()
    console.print(
        make_table(
            f"{metrics['task'].replace('_', ' ').capitalize()}, preset {metrics['preset']} ({what})",
            [f"measured ({spoken(metrics['metric'])}: {better})", "before training", "after training"],
            result_rows(metrics),
        )
    )
    rows = training_rows(metrics)
    if metrics["world_size"] > 1 and metrics["ranks_identical"] is not None:
        rows.append(["replicas identical", "yes" if metrics["ranks_identical"] else "NO"])
    folder = Path(output_dir)
    console.print(make_table(None, ["", ""], rows, header=False))
    # A path that is wrapped cannot be copied.
    for name, file in (("model card", CARD_FILE), ("figure", CURVES_FILE), ("all numbers", METRICS_FILE)):
        if (folder / file).exists():
            console.print(f"  {name:<12}{folder / file}", soft_wrap=True, highlight=False, markup=False)
    if metrics["status"] == "diverged":
        console.print("The run diverged: its metric is not finite. Decrease --learning_rate or the step size.")


def make_table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], header: bool = True, numbers: bool = True
) -> Table:
    """Return a table whose first column is text; with `numbers`, the other columns are right-aligned."""
    # Text, because strings may hold markup: an output folder, the name of a method.
    table = Table(
        title=None if title is None else Text(title, style="table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=header,
    )
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index > 0 and header and numbers else "left"
        table.add_column(Text(column), justify=justify, overflow="fold", no_wrap=header and index == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
