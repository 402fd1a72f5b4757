"""hf-extrap train: train one model, or say what it would cost."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .fields import CONFIGURED, path_and_fields, print_fields
from .imports import hide_loading_bars, importing


def train(
    context: typer.Context,
    words: CONFIGURED = None,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Print the configuration and what it costs; write nothing.")
    ] = False,
    help_: Annotated[
        bool, typer.Option("--help", "-h", help="Show this message; --task NAME chooses the task.")
    ] = False,
    help_all: Annotated[bool, typer.Option("--help_all", help="List every field, also the Trainer's.")] = False,
) -> int:
    """Train one model.

    Fields in CONFIG.yaml have the names below; --field value on the command line takes precedence.

    \b
    Examples:
      hf-extrap train configs/language_modeling/builtin_lstm.yaml --extrap extrap
      hf-extrap train --task translation --max_steps 100 --dry_run > run.yaml
      hf-extrap train run.yaml --resume_from_checkpoint true
    """
    path, fields = path_and_fields(words)
    with importing():
        from hf_extrap.recipes import get_task
        from hf_extrap.recipes.configuration import make_parser, read_mapping, resolve, task_name

        if help_ or help_all:
            task = get_task(task_name(read_mapping(path) if path else {}, fields))
            if help_all:
                make_parser(task).print_help()
            else:
                typer.echo(context.get_help())
                print_fields(task)
            return 0
        from hf_extrap.recipes.run import run
        from hf_extrap.recipes.tables import print_run

    hide_loading_bars()
    configuration = resolve(path, fields)
    arguments = configuration.training_arguments
    if dry_run:
        from hf_extrap.lab.dry_run import dry_run as plan

        text = plan(configuration)
        if arguments.process_index == 0:
            typer.echo(text)
        return 0
    if "disable_tqdm" not in configuration.given and not sys.stderr.isatty():
        # A line for each logged row, in place of a bar.
        arguments.disable_tqdm = True
    try:
        metrics = run(configuration, context.obj, stops_on_signals=True)
    except Exception as error:
        # Libraries that write files do not name them.
        error.add_note(f"in {arguments.output_dir}")
        raise
    if arguments.process_index == 0:
        print_run(metrics, str(arguments.output_dir))
    return 0
