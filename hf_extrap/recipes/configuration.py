"""A run's arguments from task defaults, a YAML file and command-line words; later ones take precedence."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.yaml_text import read_yaml
from hf_extrap.recipes import TASKS, get_task
from hf_extrap.recipes.run_folder import read_json, read_text
from hf_extrap.recipes.task import Task
from hf_extrap.training.argument_types import check_numbers
from hf_extrap.training.arguments import ExtrapSeq2SeqTrainingArguments, ExtrapTrainingArguments, described

PROGRAM_DEFAULTS: dict[str, Any] = {
    # The history must contain a NaN loss; the stock filter repeats the last finite one.
    "logging_nan_inf_filter": False,
    # DDP's search for unused parameters costs time at every step; a model that needs it raises an error without.
    "ddp_find_unused_parameters": False,
}
#: Fields that name the optimizer, and fields that configure it.
OPTIMIZERS = ("optim", "base_optimizer")
OF_OPTIMIZER = ("optim_args", "sgd_momentum", "sgd_nesterov")


@dataclass
class RunArguments:
    """Fields of the run itself; `evaluate_untrained` is ignored with DeepSpeed and FSDP, and by tasks that generate."""

    task: str = described("language_modeling", f"What to train: {', '.join(TASKS)}.")
    evaluate_untrained: bool = described(True, "Evaluate once before the first step.")
    abort_factor: float | None = described(
        None, "Stop at a loss that is not finite, or after the warm-up this many times the first one; null: never."
    )
    save_model: bool = described(True, "Write the trained model, its card and its curves.")
    license: str | None = described(None, "Licence of the model in its card, such as mit; default: of a local `model`.")

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.abort_factor is not None and not self.abort_factor > 1:
            raise ValueError(f"abort_factor is {self.abort_factor}; allowed: a number > 1, or null.")


@dataclass
class Configuration:
    """The resolved arguments of one run.

    `given` has every field set by the task's defaults, the YAML file or the command line, with its parsed value.
    """

    run: RunArguments
    task: Task
    task_arguments: Any
    training_arguments: ExtrapTrainingArguments | ExtrapSeq2SeqTrainingArguments
    given: dict[str, Any]


class UnknownFieldError(ValueError):
    """A word of the command line that names no field; `unknown_field` is that name, with underscores."""

    def __init__(self, word: str, known: Sequence[str]) -> None:
        self.unknown_field = _word_name(word)
        super().__init__(f"unknown field --{self.unknown_field}{_closest(self.unknown_field, known)}.")


class _Parser(HfArgumentParser):
    """HfArgumentParser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        # "argument --learning_rate/--learning-rate: invalid float value: 'x'" -> the first name only.
        match = re.match(r"argument (--\w+)\S*: (.*)", message, re.DOTALL)
        raise ValueError(f"{match[1]}: {match[2]}." if match else f"{message}.")


def resolve(config: str | Path | None, words: Sequence[str] = ()) -> Configuration:
    """Resolve the arguments of one run.

    Args:
        config: path of a YAML mapping of field names to values, or None for the task's defaults.
        words: command-line words, `--field value …`. If they name another preset than the file, the file's `extrap_*`
            fields, which tune its preset, are ignored; if they name another optimizer, so are the file's `optim_args`
            and the like. In the same way the file takes precedence over the task's defaults.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one sentence: the file is not a YAML mapping, a field is unknown, a value is not allowed, or the
            launched processes do not form a process group.
    """
    mapping = read_mapping(config) if config is not None else {}
    task = get_task(task_name(mapping, words))
    parser = make_parser(task)
    known = [f.name for kind in parser.dataclass_types for f in dataclasses.fields(kind) if f.init]
    for name in [name for name in mapping if name not in known][:1]:
        raise ValueError(f"{config}: unknown field {name!r}{_closest(name, known)}.")
    optimizer = {name: value for name in OPTIMIZERS if (value := _word_value(words, name)) is not None}
    mapping = _without_other_optimizer(_without_other_preset(mapping, words), optimizer)
    defaults = {**PROGRAM_DEFAULTS, **task.training_defaults()}
    defaults = _without_other_optimizer(defaults, {**mapping, **optimizer})
    # null in the file resets a default of the task.
    merged = {name: value for name, value in {**defaults, **mapping}.items() if value is not None}
    try:
        namespace, rest = parser.parse_known_args([*to_words(merged), *words])
    except ArgumentError as error:
        raise ValueError(f"{error}.") from error
    for word in rest:
        if not word.startswith("--"):
            raise ValueError(f"unexpected word {word!r}: every value follows its --field.")
        raise UnknownFieldError(word, known)
    values = vars(namespace)
    names = {*merged, *(_word_name(word).removeprefix("no_") for word in words if word.startswith("--"))}
    given = {name: values[name] for name in sorted(names & set(values))} | {"task": task.name}
    if "output_dir" not in given:
        stem = Path(config).stem if config is not None else task.name
        values["output_dir"] = str(Path("runs") / f"{stem}-{values['extrap']}-{values['seed']}")
    # Without an accelerator, the Trainer forms a process group of the processes only with use_cpu.
    if "use_cpu" not in given and not torch.accelerator.is_available():
        values["use_cpu"] = True
    deepspeed = values["deepspeed"]
    if isinstance(deepspeed, str) and os.path.isfile(deepspeed):
        # Transformers would not name the file.
        read_json(Path(deepspeed))
    run, task_arguments, training_arguments = (
        kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init}) for kind in parser.dataclass_types
    )
    check_processes(training_arguments)
    return Configuration(run, task, task_arguments, training_arguments, given)


def make_parser(task: Task) -> HfArgumentParser:
    """Return the parser of all fields of a run of this task."""
    training = ExtrapSeq2SeqTrainingArguments if task.seq2seq else ExtrapTrainingArguments
    kinds: list[Any] = [RunArguments, task.arguments_class, training]
    return _Parser(
        kinds,
        prog="hf-extrap train [CONFIG.yaml]",
        allow_abbrev=False,
        description=f"Train the task {task.name}; fields in a CONFIG.yaml have the same names.",
    )


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML file; FileNotFoundError if there is none, ValueError if it is not YAML, or not a mapping of names."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration {path} does not exist.")
    content = read_yaml(read_text(path), str(path))
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} is not a mapping of field names to values.")
    return content


def to_words(mapping: Mapping[str, Any]) -> list[str]:
    """Return a mapping as command-line words: lists as several words, mappings as JSON."""
    words: list[str] = []
    for name, value in mapping.items():
        if isinstance(value, list | tuple):
            words += [f"--{name}", *(str(item) for item in value)]
        elif isinstance(value, Mapping):
            words.append(f"--{name}={json.dumps(value)}")
        else:
            words.append(f"--{name}={getattr(value, 'value', value)}")
    return words


def task_name(mapping: Mapping[str, Any], words: Sequence[str]) -> str:
    """Name of the task, from the words, the mapping, or the default."""
    return _word_value(words, "task") or str(mapping.get("task") or RunArguments.task)


def check_processes(arguments: ExtrapTrainingArguments | ExtrapSeq2SeqTrainingArguments) -> None:
    """Raise a ValueError unless all launched processes are in the process group and each has at most one GPU."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != launched:
        raise ValueError(
            f"{launched} processes were launched, but the process group has {arguments.world_size}; "
            "launch with torchrun, or with accelerate and one of configs/accelerate."
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"one process sees {arguments.n_gpu} GPUs, and extrapolation needs one process for each; launch "
            f"with torchrun --nproc_per_node {arguments.n_gpu}, or choose one with CUDA_VISIBLE_DEVICES."
        )


def _word_value(words: Sequence[str], name: str) -> str | None:
    value = None
    for index, word in enumerate(words):
        if word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        elif word == f"--{name}" and index + 1 < len(words):
            value = words[index + 1]
    return value


def _word_name(word: str) -> str:
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def _without_other_preset(mapping: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Drop the fields that tune the mapping's preset if the words name another one."""
    preset = _word_value(words, "extrap")
    if preset is None or preset == mapping.get("extrap", "none"):
        return dict(mapping)
    tuning = {f"extrap_{f.name}" for f in dataclasses.fields(ExtrapConfig)}
    return {name: value for name, value in mapping.items() if name not in tuning}


def _without_other_optimizer(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the fields of the optimizer if those of higher precedence name another one."""
    named = {name: over[name] for name in OPTIMIZERS if over.get(name) is not None}
    if all(fields.get(name) == value for name, value in named.items()):
        return dict(fields)
    return {name: value for name, value in fields.items() if name not in (*OPTIMIZERS, *OF_OPTIMIZER)}


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else " (`hf-extrap train --help_all` lists all)"
