"""hf-extrap bench: step time and memory beside the base optimizer and the peers."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .imports import importing


def bench(
    part: Annotated[
        str | None, typer.Option("--part", help="cpu or gpu: the workloads for it; default: by the device.")
    ] = None,
    workloads: Annotated[
        str | None, typer.Option("--workloads", help="Names, separated by commas, instead of a part.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Names, separated by semicolons; default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Interleaved steps of each method.")] = 20,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Begin no step after this many minutes.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; default: a GPU if there is one.")] = None,
    output_dir: Annotated[
        str, typer.Option("--output_dir", help="Folder to write to, and to continue from.")
    ] = "runs/bench",
) -> int:
    """Measure step time and memory beside the base optimizer and the peers.

    Interleaved rounds of every method on every workload; results in the folder are kept.

    \b
    Example:
      hf-extrap bench --part cpu --rounds 7 --minutes 10
    """
    # The profiler, which counts memory, logs its starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with importing():
        from hf_extrap.lab.bench.bench import METHODS, workloads_of
        from hf_extrap.lab.bench.bench import bench as measure

    measure(
        workloads.split(",") if workloads else workloads_of(part, device),
        [name.strip() for name in methods.split(";")] if methods else list(METHODS),
        rounds,
        minutes,
        output_dir,
        device,
    )
    return 0
