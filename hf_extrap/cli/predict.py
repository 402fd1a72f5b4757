"""hf-extrap predict: classify images by a saved model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from .imports import hide_loading_bars, importing

PARSER: dict[str, Any] = {
    "help": "classify images by a saved model",
    "usage": "hf-extrap predict CHECKPOINT IMAGE ... [options]",
    "description": "CHECKPOINT is the folder of a run, of a checkpoint in it, or of any saved model. Prints the image, "
    "the class and its probability, separated by tabs.",
    "epilog": "Example: hf-extrap predict runs/digits 3.png 7.png --top_k 3",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the model")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file")
    parser.add_argument("--top_k", type=int, default=1, help="most likely classes to print of each image; default: 1")
    parser.add_argument("--batch_size", type=int, default=32, help="images that are classified together; default: 32")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line for each image")


def run(known: argparse.Namespace, rest: list[str], command: str) -> int:
    """Print the most likely classes of each image."""
    with importing():
        from hf_extrap.recipes.inference import predict
        from hf_extrap.training.markdown import one_line

    hide_loading_bars()
    found = predict(known.checkpoint, known.images, known.top_k, known.batch_size, progress=True)
    for image, predictions in zip(known.images, found, strict=True):
        if known.json:
            print(json.dumps({"image": image, "predictions": [asdict(one) for one in predictions]}), flush=True)
        else:
            for one in predictions:
                print(f"{image}\t{one_line(one.label)}\t{one.probability:.4f}", flush=True)
    return 0
