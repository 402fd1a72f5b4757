"""`python -m hf_extrap.lab.scale plan` and `python -m hf_extrap.lab.scale simulate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .report import draw, plan_tables, simulation_table
from .simulation import VARIANTS, WORKERS, measure


def main() -> None:
    """Print tables; a simulation also writes its numbers and a figure."""
    parser = argparse.ArgumentParser("python -m hf_extrap.lab.scale")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="bytes sent and held, by formulas")
    plan.add_argument("--parameters", type=int, default=1_500_000_000)
    plan.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    plan.add_argument("--node", type=int, default=8, help="ranks that share one copy of the weights under HSDP")
    simulate = commands.add_parser("simulate", help="seconds and memory of virtual workers on this machine's CPU")
    simulate.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    simulate.add_argument("--width", type=int, default=512)
    simulate.add_argument("--json", type=Path, default=Path("docs/scale.json"))
    simulate.add_argument("--figure", type=Path, default=Path("docs/figures/scale_virtual_workers.png"))
    arguments = parser.parse_args()
    if arguments.command == "plan":
        print(plan_tables(arguments.parameters, tuple(arguments.ranks), arguments.node))
        return
    rows = []
    for workers in arguments.workers:
        for variant in VARIANTS:
            rows.append(measure(variant, workers, width=arguments.width))
            print(json.dumps(rows[-1]), flush=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    draw(rows, arguments.figure)
    print(simulation_table(rows))


if __name__ == "__main__":
    main()
