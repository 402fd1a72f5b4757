"""hf-extrap study: tune and run methods at several batch sizes."""

from __future__ import annotations

import argparse

from .imports import importing

PARSER = {"help": "tune and run methods at several batch sizes"}
ACTIONS = {
    "run": "run what is left of a study; finished runs are kept",
    "report": "write tables and figures of the finished runs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, purpose in ACTIONS.items():
        own = actions.add_parser(action, help=purpose, description=purpose, allow_abbrev=False)
        own.add_argument("study", metavar="STUDY.yaml")
        own.add_argument("--output_dir", help="the study's folder; default: runs/study-<name>")
        if action == "run":
            own.add_argument("--minutes", type=float, help="stop after this many minutes")
            own.add_argument("--jobs", type=int, default=1, help="concurrent processes, one thread each")


def run(known: argparse.Namespace, rest: list[str], command: str) -> int:
    """Run the action."""
    with importing():
        if known.action == "run":
            from hf_extrap.lab.study.runner import run_study

            return run_study(known.study, known.minutes, known.jobs, known.output_dir, command)
        from hf_extrap.lab.study.report import report_study
    report_study(known.study, known.output_dir, command)
    return 0
