"""The command line, hf-extrap: parser assembly and the main function; each command has a file of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hf_extrap.recipes.secrets import command_line, without_secrets

from . import bench, check_launch, compare, generate, predict, sharpness, study, train

COMMANDS = {
    "train": train,
    "generate": generate,
    "predict": predict,
    "compare": compare,
    "study": study,
    "sharpness": sharpness,
    "bench": bench,
    "doctor": check_launch,
}
WITH_FIELDS = ("train", "compare", "sharpness")
"""Commands that take a path first, and `--field value` options that argparse does not know."""

#: Parts of the messages of libraries whose errors have no type of their own.
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory")
UNWRITTEN = ("inline_container.cc", "PytorchStreamWriter", "basic_ios::clear", "os error 27", "os error 28")


def main(words: Sequence[str] | None = None) -> int:
    """Run the program with these words, by default those of the command line, and return its exit code.

    It is 0 for success; 2 for an error of the input or the file system, printed as one sentence on stderr; for `study
    run` 1 if a run failed and 130 after Ctrl-C; for `doctor` 1 if a given configuration cannot run here.
    """
    words = list(sys.argv[1:] if words is None else words)
    command = command_line(words)
    # Argparse would take the value of an unknown field for a positional argument.
    path = words.pop(1) if len(words) > 1 and words[0] in WITH_FIELDS and words[1][:1] != "-" else None
    known, rest = _parser().parse_known_args(words)
    known.path = path
    try:
        if rest and known.command not in WITH_FIELDS:
            raise ValueError(f"{known.command} takes no {rest[0]!r}.")
        return COMMANDS[known.command].run(known, rest, command)
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None or os.environ.get("HF_EXTRAP_TRACEBACK"):
            raise
        # Any process may be the only one that fails. In one write: the lines of processes must not mix.
        rank = os.environ.get("RANK", "0")
        place = "" if rank == "0" else f" process {rank}:"
        sys.stderr.write(f"hf-extrap:{place} error: {without_secrets(sentence)}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hf-extrap",
        description="Extrapolation for large-batch training of Hugging Face models.",
        epilog="Errors are printed as one sentence, and with their traceback if HF_EXTRAP_TRACEBACK=1 is set.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, allow_abbrev=False, **module.PARSER))
    return parser


def _sentence(error: Exception) -> str | None:
    """The message of an error that the user can correct, on one line; None for any other error."""
    # `in FOLDER`, for an error that names no file.
    place = " ".join(getattr(error, "__notes__", ()))
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename or place, f"{error.strerror}.") if part)
    sentence = " ".join(str(error).split()).removesuffix(".") + "."
    if any(sign in sentence for sign in OUT_OF_MEMORY):
        return f"there is not enough memory: {sentence}"
    if any(sign in sentence for sign in UNWRITTEN):
        return f"{' '.join(filter(None, ('a file', place)))} cannot be written, as on a full disk: {sentence}"
    # By name, because importing these libraries takes longer than parsing the command line.
    named = {"YAMLError", "SafetensorError"} & {kind.__name__ for kind in type(error).__mro__}
    known = (ValueError, OSError, ModuleNotFoundError, MemoryError)
    return sentence if named or isinstance(error, known) else None
