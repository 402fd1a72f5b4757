"""hf-extrap study: tune and run methods at several batch sizes."""

from __future__ import annotations

from typing import Annotated

import typer

from .imports import importing

STUDY = Annotated[str, typer.Argument(metavar="STUDY.yaml", show_default=False, help="The study's specification.")]
FOLDER = Annotated[str | None, typer.Option("--output_dir", help="The study's folder; default: runs/study-<name>.")]

app = typer.Typer(help="Tune and run methods at several batch sizes.", rich_markup_mode=None)


@app.command("run")
def run(
    context: typer.Context,
    study: STUDY,
    output_dir: FOLDER = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Stop after this many minutes.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Concurrent processes, one thread each.")] = 1,
) -> int:
    """Run what is left of a study; finished runs are kept.

    \b
    Example:
      hf-extrap study run configs/studies/example_digits.yaml --jobs 2
    """
    with importing():
        from hf_extrap.lab.study.runner import run_study

    return run_study(study, minutes, jobs, output_dir, context.obj)


@app.command("report")
def report(context: typer.Context, study: STUDY, output_dir: FOLDER = None) -> int:
    """Write tables and figures of the finished runs.

    \b
    Example:
      hf-extrap study report configs/studies/example_digits.yaml
    """
    with importing():
        from hf_extrap.lab.study.report import report_study

    report_study(study, output_dir, context.obj)
    return 0
