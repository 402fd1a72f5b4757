"""hf-extrap generate: continue or translate texts by a saved model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .imports import hide_loading_bars, importing

PARSER: dict[str, Any] = {
    "help": "continue or translate texts by a saved model",
    "usage": "hf-extrap generate CHECKPOINT [TEXT ...] [options]",
    "description": "CHECKPOINT is the folder of a run, of a checkpoint in it, or of any saved model. Without a TEXT, "
    "or with - as the only one, texts are the lines of the standard input. Each text gives one line of output.",
    "epilog": 'Example: hf-extrap generate runs/builtin "the value of" --do_sample --top_k 20 --seed 1',
}
#: Option -> its type and description; the fields of `recipes.inference.GenerationOptions`.
OPTIONS: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (int, "limit of the generated tokens; default: the model's, or 40"),
    "num_beams": (int, "beams of beam search; default: the model's"),
    "length_penalty": (float, "exponent of the length in beam search"),
    "temperature": (float, "with --do_sample: divides the logits"),
    "top_k": (int, "with --do_sample: sample from that many most likely tokens; 0 for all"),
    "top_p": (float, "with --do_sample: sample from the most likely tokens whose probabilities sum to this"),
    "repetition_penalty": (float, "factor on the logits of tokens that have occurred"),
    "no_repeat_ngram_size": (int, "no n-gram of this size occurs twice"),
    "seed": (int, "with --do_sample: seed of the random numbers"),
    "batch_size": (int, "texts that are generated together; default: 16"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the model")
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="a text to continue or to translate")
    parser.add_argument("--do_sample", action="store_true", default=None, help="draw tokens at random")
    for name, (kind, description) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=description)


def run(known: argparse.Namespace, rest: list[str], command: str) -> int:
    """Print one line for each text."""
    with importing():
        from hf_extrap.recipes.inference import GenerationOptions, generate

    hide_loading_bars()
    given = {name: getattr(known, name) for name in (*OPTIONS, "do_sample")}
    options = GenerationOptions(**{name: value for name, value in given.items() if value is not None})
    texts = sys.stdin.read().splitlines() if known.texts in ([], ["-"]) else known.texts
    for line in generate(known.checkpoint, texts, options, progress=True):
        print(line, flush=True)
    return 0
