"""hf-extrap generate: continue or translate texts by a saved model."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .imports import hide_loading_bars, importing


def option(name: str, description: str) -> Any:
    return typer.Option(f"--{name}", help=description)


def generate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder of the model.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT ...]", help="Texts; default: stdin.")] = None,
    max_new_tokens: Annotated[int | None, option("max_new_tokens", "Limit; default: the model's, or 40.")] = None,
    num_beams: Annotated[int | None, option("num_beams", "Beams of beam search; default: the model's.")] = None,
    length_penalty: Annotated[float | None, option("length_penalty", "Exponent of the length with beams.")] = None,
    do_sample: Annotated[bool, option("do_sample", "Draw tokens at random.")] = False,
    temperature: Annotated[float | None, option("temperature", "Of sampling: divides the logits.")] = None,
    top_k: Annotated[int | None, option("top_k", "Of sampling: the most likely tokens; 0 for all.")] = None,
    top_p: Annotated[float | None, option("top_p", "Of sampling: the tokens of this total probability.")] = None,
    repetition_penalty: Annotated[float | None, option("repetition_penalty", "Factor for seen tokens.")] = None,
    no_repeat_ngram_size: Annotated[int | None, option("no_repeat_ngram_size", "No n-gram occurs twice.")] = None,
    seed: Annotated[int | None, option("seed", "Of sampling: seed of the random numbers.")] = None,
    batch_size: Annotated[int, option("batch_size", "Texts that are generated together.")] = 16,
) -> int:
    """Continue or translate texts by a saved model.

    CHECKPOINT is the folder of a run, of a checkpoint in it, or of any saved model. Without a TEXT, or with - as the
    only one, texts are the lines of the standard input. Each text gives one line of output.

    \b
    Example:
      hf-extrap generate runs/builtin "the value of" --do_sample --top_k 20 --seed 1
    """
    with importing():
        from hf_extrap.recipes.inference import GenerationOptions
        from hf_extrap.recipes.inference import generate as generated

    hide_loading_bars()
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
        do_sample=do_sample or None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        seed=seed,
        batch_size=batch_size,
    )
    given = sys.stdin.read().splitlines() if texts in (None, [], ["-"]) else texts
    for line in generated(checkpoint, given or [], options, progress=True):
        print(line, flush=True)
    return 0
