"""hf-extrap init: write a first configuration for a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .imports import hide_loading_bars, importing


def init(
    data: Annotated[
        str,
        typer.Argument(metavar="NAME_OR_FOLDER", show_default=False, help="Folder, name on the Hub, or builtin."),
    ],
    task: Annotated[
        str | None, typer.Option("--task", help="language_modeling, translation or image_classification.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write; default: <name>.yaml.")
    ] = None,
) -> int:
    """Write a commented configuration for a dataset name or folder.

    A folder holds train, validation and test as text, JSON or Parquet. The task is that of their columns: text,
    sentence pairs, or images with a class. A file that exists is kept.

    \b
    Examples:
      hf-extrap init my_texts/ && hf-extrap train my_texts.yaml
      hf-extrap init bentrevett/multi30k --task translation -o multi30k.yaml
    """
    path = output or Path(f"{Path(data).resolve().name if Path(data).is_dir() else data.rpartition('/')[2]}.yaml")
    if path.exists():
        raise ValueError(f"{path} exists already; give another file with -o.")
    with importing():
        from hf_extrap.recipes.run_folder import write_text
        from hf_extrap.recipes.starting import first_configuration, look_at

    hide_loading_bars()
    found = look_at(data, task)
    write_text(path, first_configuration(found))
    typer.echo(f"{found.sentence}\nWrote {path}; next: hf-extrap train {path} --dry_run")
    return 0
