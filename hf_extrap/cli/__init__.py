"""The command line, hf-extrap: the program and the main function; each command has a file of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from hf_extrap.recipes.secrets import command_line, without_secrets

from . import study
from .bench import bench
from .check_launch import doctor
from .compare import compare
from .errors import sentence_of
from .generate import generate
from .init import init
from .predict import predict
from .sharpness import sharpness
from .train import train
from .watch import watch

PROGRAM = "hf-extrap"
#: Typer takes words that it does not know for arguments, in their order: a path, and the fields of a configuration.
FIELDS = {"ignore_unknown_options": True}

app = typer.Typer(
    help="Extrapolation for large-batch training of Hugging Face models.",
    epilog="Start with `hf-extrap train`: it needs no data. `hf-extrap COMMAND --help` shows examples. Errors are one "
    "sentence with exit code 2, and a traceback if HF_EXTRAP_TRACEBACK=1 is set.",
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # --dry-run is --dry_run, as for the fields of a configuration.
        "token_normalize_func": lambda name: name.replace("-", "_"),
    },
)
app.command("init")(init)
app.command("train", context_settings=FIELDS, add_help_option=False)(train)
app.command("generate")(generate)
app.command("predict")(predict)
app.command("compare", context_settings=FIELDS)(compare)
app.add_typer(study.app, name="study")
app.command("watch")(watch)
app.command("sharpness", context_settings=FIELDS)(sharpness)
app.command("bench")(bench)
app.command("doctor")(doctor)


def main(words: Sequence[str] | None = None) -> int:
    """Run the program with these words, by default those of the command line, and return its exit code.

    It is 0 for success; 2 for an error of the input or the file system, printed as one sentence on stderr; 130 after
    Ctrl-C; 1 if a run of `study run` or `compare` failed, or a configuration given to `doctor` cannot run here.
    """
    words = list(sys.argv[1:] if words is None else words)
    program = get_command(app)
    try:
        return program.main(words, PROGRAM, standalone_mode=False, obj=command_line(words)) or 0
    except typer.Abort:
        return 130
    except Exception as error:
        sentence = sentence_of(error, program, words)
        # A wrong word has no traceback worth reading.
        traced = os.environ.get("HF_EXTRAP_TRACEBACK") and not isinstance(error, TyperException)
        if sentence is None or traced:
            raise
        # Any process may be the only one that fails. In one write: the lines of processes must not mix.
        rank = os.environ.get("RANK", "0")
        place = "" if rank == "0" else f" process {rank}:"
        sys.stderr.write(f"{PROGRAM}:{place} error: {without_secrets(sentence)}\n")
        return 2
