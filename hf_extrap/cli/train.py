"""hf-extrap train: train one model."""

from __future__ import annotations

import argparse

from .imports import hide_loading_bars, importing

PARSER = {"help": "train one model", "add_help": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --help alone; the other options are the fields of the configuration, which depend on the task."""
    parser.add_argument("-h", "--help", action="store_true", help="list every field")


def run(known: argparse.Namespace, rest: list[str], command: str) -> int:
    """Train the model of the configuration, or print its fields."""
    with importing():
        from hf_extrap.recipes import get_task
        from hf_extrap.recipes.configuration import make_parser, read_mapping, resolve, task_name

        if not known.help:
            from hf_extrap.recipes.run import run
            from hf_extrap.recipes.tables import print_run

    if known.help:
        mapping = read_mapping(known.path) if known.path else {}
        make_parser(get_task(task_name(mapping, rest))).print_help()
        return 0
    hide_loading_bars()
    configuration = resolve(known.path, rest)
    try:
        metrics = run(configuration, command, stops_on_signals=True)
    except Exception as error:
        # Libraries that write files do not name them.
        error.add_note(f"in {configuration.training_arguments.output_dir}")
        raise
    if configuration.training_arguments.process_index == 0:
        print_run(metrics, str(configuration.training_arguments.output_dir))
    return 0
