"""hf-extrap predict: classify images by a saved model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from .imports import hide_loading_bars, importing


def predict(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder of the model.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE ...", help="Image files.")],
    top_k: Annotated[int, typer.Option("--top_k", help="Most likely classes to print of each image.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Images that are classified together.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each image.")] = False,
) -> int:
    """Classify images by a saved model.

    CHECKPOINT is the folder of a run, of a checkpoint in it, or of any saved model. Prints the image, the class and its
    probability, separated by tabs.

    \b
    Example:
      hf-extrap predict runs/digits 3.png 7.png --top_k 3
    """
    with importing():
        from hf_extrap.recipes.inference import predict as predicted

    hide_loading_bars()
    found = predicted(checkpoint, images, top_k, batch_size, progress=True)
    for image, predictions in zip(images, found, strict=True):
        if as_json:
            print(json.dumps({"image": image, "predictions": [asdict(one) for one in predictions]}), flush=True)
        else:
            for one in predictions:
                print(f"{image}\t{one.label}\t{one.probability:.4f}", flush=True)
    return 0
