"""hf-extrap doctor: versions, devices, and which launch configurations can run here."""

from __future__ import annotations

import argparse
import json

PARSER = {
    "help": "versions, devices, and what can run here",
    "description": "Says which launch configurations this machine can run, and why not; default: the shipped ones.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="of accelerate, DeepSpeed or training")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(known: argparse.Namespace, rest: list[str], command: str) -> int:
    """Print the report; return 1 if a given configuration cannot run here."""
    from .doctor import machine
    from .doctor.configurations import judge, shipped
    from .doctor.report import content, print_tables

    here = machine.this_machine()
    verdicts = [judge(path, here) for path in known.configs or shipped()]
    report = content(here, verdicts)
    print(json.dumps(report, indent=2)) if known.json else print_tables(report)
    return int(bool(known.configs) and any(verdict.obstacles for verdict in verdicts))
