"""hf-extrap compare: train presets on the same data order."""

from __future__ import annotations

from typing import Annotated

import typer

from .fields import CONFIGURED, path_and_fields
from .imports import hide_loading_bars, importing


def compare(
    context: typer.Context,
    words: CONFIGURED = None,
    presets: Annotated[
        str, typer.Option("--presets", help="Presets, separated by commas.")
    ] = "none,extrap,extrap-past",
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, separated by commas.")] = "0,1,2",
    learning_rates: Annotated[
        str | None, typer.Option("--learning_rates", help="Separated by commas; default: the configuration's.")
    ] = None,
    target: Annotated[float | None, typer.Option("--target", help="Value of the metric to count the steps to.")] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Folder for all runs; default: runs/compare-<config>.")
    ] = None,
) -> int:
    """Train presets against each other on the same data order.

    CONFIG.yaml and --field value apply to every run. Finished runs are not repeated.

    \b
    Example:
      hf-extrap compare configs/translation/builtin.yaml --seeds 0,1 \\
          --presets none,extrap-past:step_ratio=0.5
    """
    with importing():
        from hf_extrap.lab.compare import compare as run
        from hf_extrap.lab.compare import comparison, parse_list

    hide_loading_bars()
    study = comparison(
        *path_and_fields(words),
        presets=parse_list("presets", presets, str),
        seeds=parse_list("seeds", seeds, int),
        learning_rates=parse_list("learning_rates", learning_rates, float) if learning_rates else None,
        target=target,
    )
    return run(study, output_dir, context.obj)
