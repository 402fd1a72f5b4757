"""The command line: hf-extrap train, compare, doctor."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

DESCRIPTION = "Extrapolation for large-batch training of Hugging Face models."
EPILOG = "Errors are told in one sentence; with HF_EXTRAP_TRACEBACK=1 in the environment, with their traceback."


def main(words: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        words: command-line words; default: those of this process.

    Returns:
        The exit code: 0, or 2 for an error that the user can mend, told in one sentence on stderr.
    """
    words = list(sys.argv[1:] if words is None else words)
    command = shlex.join(["hf-extrap", *words])
    # Argparse would take the value of a field that it does not know for the configuration.
    config = words.pop(1) if len(words) > 1 and words[0] in ("train", "compare") and words[1][:1] != "-" else None
    known, rest = _parser().parse_known_args(words)
    try:
        if known.command == "train":
            return _train(config, known.help, rest, command)
        if known.command == "compare":
            return _compare(config, known, rest, command)
        if rest:
            raise ValueError(f"doctor takes no {rest[0]!r}.")
        return _doctor()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("HF_EXTRAP_TRACEBACK"):
            raise
        # One process speaks for all.
        if os.environ.get("RANK", "0") == "0":
            print("hf-extrap: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-extrap", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train one model", add_help=False, allow_abbrev=False)
    train.add_argument("-h", "--help", action="store_true", help="list every field")
    compare = commands.add_parser(
        "compare",
        help="train presets against each other on the same data order",
        usage="hf-extrap compare [CONFIG.yaml] [options] [--field value ...]",
        description="CONFIG.yaml and the other words, --field value, go to every run.",
        allow_abbrev=False,
    )
    compare.add_argument("--presets", default="none,extrap,extrap-past", help="presets, separated by commas")
    compare.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    compare.add_argument("--learning_rates", default=None, help="separated by commas; default: the configuration's")
    compare.add_argument("--target", type=float, default=None, help="value of the metric to count the steps to")
    compare.add_argument("--output_dir", default=None, help="folder for all runs; default: runs/compare-<config>")
    commands.add_parser("doctor", help="versions, devices, and what can run here", allow_abbrev=False)
    return parser


def _train(config: str | None, wants_help: bool, rest: list[str], command: str) -> int:
    from hf_extrap.configuration import make_parser, read_mapping, resolve, task_name
    from hf_extrap.tasks import get_task

    if wants_help:
        mapping = read_mapping(config) if config else {}
        make_parser(get_task(task_name(mapping, rest))).print_help()
        return 0
    from hf_extrap.report import print_run
    from hf_extrap.run import run

    _quiet()
    configuration = resolve(config, rest)
    metrics = run(configuration, command)
    if configuration.training_arguments.process_index == 0:
        print_run(metrics, str(configuration.training_arguments.output_dir))
    return 0


def _compare(config: str | None, known: argparse.Namespace, rest: list[str], command: str) -> int:
    from hf_extrap.compare import compare, parse_list

    _quiet()
    compare(
        config,
        rest,
        presets=parse_list("presets", known.presets, str),
        seeds=parse_list("seeds", known.seeds, int),
        learning_rates=parse_list("learning_rates", known.learning_rates, float) if known.learning_rates else None,
        target=known.target,
        output_dir=known.output_dir,
        command=command,
    )
    return 0


def _quiet() -> None:
    """Leave the bars of training and evaluation, not one for every file that is read or written."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _doctor() -> int:
    from hf_extrap.doctor import print_report

    print_report()
    return 0
