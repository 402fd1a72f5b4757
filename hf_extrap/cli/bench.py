"""hf-extrap bench: step time and memory beside the base optimizer and the peers."""

from __future__ import annotations

import argparse
import os

from .imports import importing

PARSER = {
    "help": "step time and memory beside the base optimizer and the peers",
    "description": "Interleaved rounds of every method on every workload; results in the folder are kept.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", help="cpu or gpu: the workloads for it; default: by the device")
    parser.add_argument("--workloads", help="names, separated by commas, instead of a part")
    parser.add_argument("--methods", help="names, separated by semicolons; default: all")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved steps of each method")
    parser.add_argument("--minutes", type=float, help="begin no step after this many minutes")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--output_dir", default="runs/bench", help="folder to write to, and to continue from")


def run(known: argparse.Namespace, rest: list[str], command: str) -> int:
    """Measure what the folder does not hold yet."""
    # The profiler, which counts memory, logs its starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with importing():
        from hf_extrap.lab.bench.bench import METHODS, bench, workloads_of

    workloads = known.workloads.split(",") if known.workloads else workloads_of(known.part, known.device)
    methods = [name.strip() for name in known.methods.split(";")] if known.methods else list(METHODS)
    bench(workloads, methods, known.rounds, known.minutes, known.output_dir, known.device)
    return 0
