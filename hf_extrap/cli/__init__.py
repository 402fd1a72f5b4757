"""The command line: hf-extrap train, compare, study, sharpness, bench, doctor."""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

DESCRIPTION = "Extrapolation for large-batch training of Hugging Face models."
EPILOG = "Errors are told in one sentence; with HF_EXTRAP_TRACEBACK=1 in the environment, with their traceback."


def main(words: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        words: command-line words; default: those of this process.

    Returns:
        The exit code: 0, 2 for an error that the user can mend, told in one sentence on stderr; of a study 1 if a run
        failed, and 130 after Ctrl-C; of the doctor 1 if a given configuration cannot run here.
    """
    words = list(sys.argv[1:] if words is None else words)
    command = shlex.join(["hf-extrap", *words])
    # Argparse would take the value of a field that it does not know for the configuration.
    takes_one = len(words) > 1 and words[0] in ("train", "compare", "sharpness") and words[1][:1] != "-"
    config = words.pop(1) if takes_one else None
    known, rest = _parser().parse_known_args(words)
    try:
        if known.command == "train":
            return _train(config, known.help, rest, command)
        if known.command == "compare":
            return _compare(config, known, rest, command)
        if known.command == "sharpness":
            return _sharpness(config, known, rest, command)
        if rest:
            raise ValueError(f"{known.command} takes no {rest[0]!r}.")
        if known.command == "study":
            return _study(known, command)
        return _bench(known) if known.command == "bench" else _doctor(known)
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
    sharpness = commands.add_parser(
        "sharpness",
        help="measure the largest Hessian eigenvalue of a saved model",
        usage="hf-extrap sharpness CHECKPOINT [options] [--field value ...]",
        description="CHECKPOINT is the folder of a run, of a checkpoint in it, or of any saved model; the other words, "
        "--field value, win over the run's own fields.",
        allow_abbrev=False,
    )
    sharpness.add_argument("--config", default=None, help="fields of a saved model that no run.json describes")
    sharpness.add_argument("--batches", type=int, default=4, help="batches that the loss is averaged over")
    sharpness.add_argument("--split", default="train", help="train or validation")
    sharpness.add_argument("--differentiation", default="autograd", help="of the gradient: autograd or differences")
    sharpness.add_argument("--batch_norm", default="batch", help="statistics of BatchNorm: batch or running")
    sharpness.add_argument("--tolerance", type=float, default=1e-2, help="of the eigenvalue's residual")
    sharpness.add_argument("--output_dir", default=None, help="folder to write to; default: CHECKPOINT")
    study = commands.add_parser("study", help="tune and run methods at several batch sizes", allow_abbrev=False)
    actions = study.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, purpose in (
        ("run", "run what is left of a study; what is done is kept"),
        ("report", "tables and figures of what is done"),
    ):
        parser_of_action = actions.add_parser(action, help=purpose, description=purpose, allow_abbrev=False)
        parser_of_action.add_argument("study", metavar="STUDY.yaml")
        parser_of_action.add_argument(
            "--output_dir", default=None, help="the study's folder; default: runs/study-<name>"
        )
        if action == "run":
            parser_of_action.add_argument("--minutes", type=float, default=None, help="stop after so many minutes")
            parser_of_action.add_argument("--jobs", type=int, default=1, help="processes at once, one thread each")
    bench = commands.add_parser(
        "bench",
        help="step time and memory beside the base optimizer and the peers",
        description="Interleaved rounds of every method on every workload; what is in the folder already is kept.",
        allow_abbrev=False,
    )
    bench.add_argument("--part", default=None, help="cpu or gpu: the workloads that are for it; default: by the device")
    bench.add_argument("--workloads", default=None, help="names, separated by commas, in the place of a part")
    bench.add_argument("--methods", default=None, help="names, separated by semicolons; default: all")
    bench.add_argument("--rounds", type=int, default=20, help="interleaved steps of each method")
    bench.add_argument("--minutes", type=float, default=None, help="begin no step after so many minutes")
    bench.add_argument("--device", default=None, help="cpu or cuda; default: a GPU if there is one")
    bench.add_argument("--output_dir", default="runs/bench", help="folder to write to, and to go on from")
    doctor = commands.add_parser(
        "doctor",
        help="versions, devices, and what can run here",
        description="Which launch configurations this machine can run, and why not; without any, the shipped ones.",
        allow_abbrev=False,
    )
    doctor.add_argument("configs", nargs="*", metavar="CONFIG", help="of accelerate, DeepSpeed or training")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


@contextmanager
def _importing() -> Iterator[None]:
    """Imports inside are spared the garbage collector, and so are later collections what they leave: it stays."""
    if not gc.isenabled() or "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _train(config: str | None, wants_help: bool, rest: list[str], command: str) -> int:
    with _importing():
        from hf_extrap.recipes import get_task
        from hf_extrap.recipes.configuration import make_parser, read_mapping, resolve, task_name

        if not wants_help:
            from hf_extrap.recipes.run import run
            from hf_extrap.recipes.tables import print_run

    if wants_help:
        mapping = read_mapping(config) if config else {}
        make_parser(get_task(task_name(mapping, rest))).print_help()
        return 0
    _quiet()
    configuration = resolve(config, rest)
    metrics = run(configuration, command)
    if configuration.training_arguments.process_index == 0:
        print_run(metrics, str(configuration.training_arguments.output_dir))
    return 0


def _compare(config: str | None, known: argparse.Namespace, rest: list[str], command: str) -> int:
    with _importing():
        from hf_extrap.lab.compare import compare, parse_list

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


def _sharpness(checkpoint: str | None, known: argparse.Namespace, rest: list[str], command: str) -> int:
    if checkpoint is None:
        raise ValueError("sharpness needs the folder of a run, a checkpoint or a saved model, before its options.")
    with _importing():
        from hf_extrap.lab.sharpness import print_sharpness, sharpness

    _quiet()
    content = sharpness(
        checkpoint,
        rest,
        config=known.config,
        batches=known.batches,
        split=known.split,
        differentiation=known.differentiation,
        batch_norm=known.batch_norm,
        tolerance=known.tolerance,
        output_dir=known.output_dir,
        command=command,
    )
    print_sharpness(content, known.output_dir or checkpoint)
    return 0


def _study(known: argparse.Namespace, command: str) -> int:
    if known.action == "report":
        with _importing():
            from hf_extrap.lab.study.report import report_study

        report_study(known.study, known.output_dir, command)
        return 0
    with _importing():
        from hf_extrap.lab.study.runner import run_study

    return run_study(known.study, known.minutes, known.jobs, known.output_dir, command)


def _bench(known: argparse.Namespace) -> int:
    # The profiler, which counts memory, tells of its starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with _importing():
        from hf_extrap.lab.bench.bench import METHODS, bench, workloads_of

    workloads = known.workloads.split(",") if known.workloads else workloads_of(known.part, known.device)
    methods = [name.strip() for name in known.methods.split(";")] if known.methods else list(METHODS)
    bench(workloads, methods, known.rounds, known.minutes, known.output_dir, known.device)
    return 0


def _quiet() -> None:
    """Leave the bars of training and evaluation, not one for every file that is read or written."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _doctor(known: argparse.Namespace) -> int:
    from hf_extrap.cli.doctor import judge_all, print_json, print_report, shipped, this_machine

    machine = this_machine()
    verdicts = judge_all(known.configs or shipped(), machine)
    (print_json if known.json else print_report)(machine, verdicts)
    return int(bool(known.configs) and not all(verdict.can_run for verdict in verdicts))
