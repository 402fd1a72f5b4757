"""hf-extrap sharpness: measure the largest Hessian eigenvalue of a saved model."""

from __future__ import annotations

import argparse

from .imports import hide_loading_bars, importing

PARSER = {
    "help": "measure the largest Hessian eigenvalue of a saved model",
    "usage": "hf-extrap sharpness CHECKPOINT [options] [--field value ...]",
    "description": "CHECKPOINT is the folder of a run, of a checkpoint in it, or of any saved model; the other "
    "options, --field value, override the run's own fields.",
}
OPTIONS = ("config", "batches", "split", "differentiation", "batch_norm", "tolerance", "output_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="fields of a saved model without run.json")
    parser.add_argument("--batches", type=int, default=4, help="batches that the loss is averaged over")
    parser.add_argument("--split", default="train", help="train or validation")
    parser.add_argument("--differentiation", default="autograd", help="of the gradient: autograd or differences")
    parser.add_argument("--batch_norm", default="batch", help="statistics of BatchNorm: batch or running")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of the eigenvalue's residual")
    parser.add_argument("--output_dir", help="folder to write to; default: CHECKPOINT")


def run(known: argparse.Namespace, rest: list[str], command: str) -> int:
    """Measure the checkpoint, and print the result."""
    if known.path is None:
        raise ValueError("sharpness needs the folder of a run, a checkpoint or a saved model, before its options.")
    with importing():
        from hf_extrap.lab.sharpness import print_sharpness, sharpness

    hide_loading_bars()
    options = {name: getattr(known, name) for name in OPTIONS}
    print_sharpness(sharpness(known.path, rest, command=command, **options), known.output_dir or known.path)
    return 0
