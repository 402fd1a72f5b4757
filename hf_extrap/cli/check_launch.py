"""hf-extrap doctor: versions, devices, and which launch configurations can run here."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(
    configs: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG", show_default=False, help="Files of accelerate, DeepSpeed or training."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> int:
    """Show versions, devices, and what can run here.

    Says which launch configurations this machine can run, and why not; by default those that are shipped. The exit
    code is 1 if a given configuration cannot run.

    \b
    Example:
      hf-extrap doctor configs/accelerate/zero2.yaml
    """
    from .doctor import machine
    from .doctor.configurations import judge, shipped
    from .doctor.report import content, print_tables

    here = machine.this_machine()
    verdicts = [judge(path, here) for path in configs or shipped()]
    report = content(here, verdicts)
    print(json.dumps(report, indent=2)) if as_json else print_tables(report)
    return int(bool(configs) and any(verdict.obstacles for verdict in verdicts))
