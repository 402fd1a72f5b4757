"""hf-extrap sharpness: measure the largest Hessian eigenvalue of a saved model."""

from __future__ import annotations

from typing import Annotated

import typer

from .fields import path_and_fields
from .imports import hide_loading_bars, importing

CHECKPOINT = typer.Argument(metavar="CHECKPOINT --field value", hidden=True)


def sharpness(
    context: typer.Context,
    words: Annotated[list[str] | None, CHECKPOINT] = None,
    config: Annotated[str | None, typer.Option("--config", help="Fields of a saved model without run.json.")] = None,
    batches: Annotated[int, typer.Option("--batches", help="Batches that the loss is averaged over.")] = 4,
    split: Annotated[str, typer.Option("--split", help="train or validation.")] = "train",
    differentiation: Annotated[
        str, typer.Option("--differentiation", help="Of the gradient: autograd or differences.")
    ] = "autograd",
    batch_norm: Annotated[
        str, typer.Option("--batch_norm", help="Statistics of BatchNorm: batch or running.")
    ] = "batch",
    tolerance: Annotated[float, typer.Option("--tolerance", help="Of the eigenvalue's residual.")] = 1e-2,
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Folder to write to; default: CHECKPOINT.")
    ] = None,
) -> int:
    """Measure the largest Hessian eigenvalue of a saved model.

    CHECKPOINT is the folder of a run, of a checkpoint in it, or of any saved model; --field value overrides the run's
    own fields.

    \b
    Example:
      hf-extrap sharpness runs/builtin --batches 4 --split validation
    """
    path, fields = path_and_fields(words)
    if path is None:
        raise ValueError("sharpness needs the folder of a run, a checkpoint or a saved model, before its options.")
    with importing():
        from hf_extrap.lab.sharpness import print_sharpness
        from hf_extrap.lab.sharpness import sharpness as measure

    hide_loading_bars()
    content = measure(
        path,
        fields,
        config=config,
        batches=batches,
        split=split,
        differentiation=differentiation,
        batch_norm=batch_norm,
        tolerance=tolerance,
        output_dir=output_dir,
        command=context.obj,
    )
    print_sharpness(content, output_dir or path)
    return 0
