"""From a YAML file and command-line words to checked arguments: task defaults < YAML < command line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from argparse import ArgumentError, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes import TASKS, get_task
from hf_extrap.recipes.task import Task
from hf_extrap.training.arguments import ExtrapSeq2SeqTrainingArguments, ExtrapTrainingArguments

PROGRAM_DEFAULTS: dict[str, Any] = {
    # A NaN loss must show in the history: the stock filter repeats the last finite one instead.
    "logging_nan_inf_filter": False,
    # DDP's search costs a walk through the graph a step; a model that needs it fails loudly without.
    "ddp_find_unused_parameters": False,
}
OPTIMIZERS = ("optim", "base_optimizer")
OF_OPTIMIZER = ("optim_args", "sgd_momentum", "sgd_nesterov")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans: `save_strategy: no` is the word, not false."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


@dataclass
class RunArguments:
    """What a run is about.

    Parameters that control the run:
        task: the name of a task in `hf_extrap.recipes.TASKS`.
        evaluate_untrained: evaluate once before the first step, for the comparison at the end. Tasks that generate
            text to be measured never do: an untrained model writes to the length limit; nor do runs under DeepSpeed
            and FSDP, which hold the weights from the beginning of training on.
        abort_factor: end training where the loss is not finite, or this many times the first logged one after the
            warm-up; None never does.
        save_model: keep the trained model, its card and its curves, not the numbers alone.
    """

    task: str = field(default="language_modeling", metadata={"help": f"What to train: {', '.join(TASKS)}."})
    evaluate_untrained: bool = field(default=True, metadata={"help": "Evaluate once before the first step."})
    abort_factor: float | None = field(
        default=None, metadata={"help": "End training at a loss that is not finite, or so many times the first one."}
    )
    save_model: bool = field(default=True, metadata={"help": "Keep the trained model, its card and its curves."})

    def __post_init__(self) -> None:
        if self.abort_factor is not None and not self.abort_factor > 1:
            raise ValueError(f"abort_factor is {self.abort_factor}; allowed: a number > 1, or null.")


@dataclass
class Configuration:
    """One run, resolved.

    Attributes:
        run: the run's own fields.
        task: the task it names.
        task_arguments: an instance of `task.arguments_class`.
        training_arguments: an instance of the extrapolating training arguments.
        given: every field that the task's defaults, the YAML file or the command line set, with its parsed value.
    """

    run: RunArguments
    task: Task
    task_arguments: Any
    training_arguments: ExtrapTrainingArguments | ExtrapSeq2SeqTrainingArguments
    given: dict[str, Any]


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are exceptions, so that every entry point words them alike."""

    def error(self, message: str) -> NoReturn:
        # "argument --learning_rate/--learning-rate: invalid float value: 'x'" -> one name, one sentence.
        match = re.match(r"argument (--\w+)\S*: (.*)", message, re.DOTALL)
        raise ValueError(f"{match[1]}: {match[2]}." if match else f"{message}.")


def resolve(config: str | Path | None, words: Sequence[str] = ()) -> Configuration:
    """Resolve one run.

    Args:
        config: path of a YAML mapping of field names to values, or None for the task's defaults.
        words: command-line words, `--field value …`; they win over the file. Where they name another preset than the
            file's, its `extrap_*` fields, which tune that preset, are left out; and so, where they name another
            optimizer, are the file's `optim_args` and the like. The file does the same to the task's defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: in one sentence: the file is not a YAML mapping, a field is unknown, a value is not allowed, or the
            processes that were launched do not see each other.
    """
    mapping = read_mapping(config) if config is not None else {}
    task = get_task(task_name(mapping, words))
    parser = make_parser(task)
    known = field_names(parser)
    for name in mapping:
        if name not in known:
            raise ValueError(f"{config}: unknown field {name!r}{_closest(name, known)}.")
    optimizer = {name: value for name in OPTIMIZERS if (value := _word_value(words, name)) is not None}
    mapping = _of_optimizer(_of_preset(mapping, words), optimizer)
    defaults = _of_optimizer({**PROGRAM_DEFAULTS, **task.training_defaults()}, {**mapping, **optimizer})
    # null in the file takes back a default of the task.
    merged = {name: value for name, value in {**defaults, **mapping}.items() if value is not None}
    namespace, rest = _parse(parser, [*to_words(merged), *words])
    for word in rest:
        if not word.startswith("--"):
            raise ValueError(f"unexpected word {word!r}: every value follows its --field.")
        name = _word_name(word)
        raise ValueError(f"unknown field --{name}{_closest(name, known)}.")
    names = {*merged, *(_word_name(word).removeprefix("no_") for word in words if word.startswith("--"))}
    given = {name: getattr(namespace, name) for name in sorted(names & set(vars(namespace)))}
    given["task"] = task.name
    _complete(namespace, given, Path(config).stem if config is not None else task.name)
    run, task_arguments, training_arguments = _build(parser, namespace)
    _check_processes(training_arguments)
    return Configuration(run, task, task_arguments, training_arguments, given)


def make_parser(task: Task) -> HfArgumentParser:
    """The parser of every field that a run of this task has."""
    training = ExtrapSeq2SeqTrainingArguments if task.seq2seq else ExtrapTrainingArguments
    kinds: list[Any] = [RunArguments, task.arguments_class, training]
    return _Parser(
        kinds,
        prog="hf-extrap train [CONFIG.yaml]",
        allow_abbrev=False,
        description=f"Train the task {task.name}; fields in a CONFIG.yaml have the same names.",
    )


def field_names(parser: HfArgumentParser) -> list[str]:
    """Names of all the fields of a parser."""
    return [f.name for kind in parser.dataclass_types for f in dataclasses.fields(kind) if f.init]


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, or not a mapping of names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration {path} does not exist.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} is not a mapping of field names to values.")
    return content


def to_words(mapping: Mapping[str, Any]) -> list[str]:
    """Command-line words that say the same as the mapping: lists as several words, mappings as JSON."""
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
    """The task that the words or, failing them, the mapping name."""
    return _word_value(words, "task") or str(mapping.get("task") or RunArguments.task)


def _word_value(words: Sequence[str], name: str) -> str | None:
    value = None
    for index, word in enumerate(words):
        if word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        elif word == f"--{name}" and index + 1 < len(words):
            value = words[index + 1]
    return value


def _of_preset(mapping: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The file's fields, without those that tune its preset if the words name another one."""
    preset = _word_value(words, "extrap")
    if preset is None or preset == mapping.get("extrap", "none"):
        return dict(mapping)
    tuning = {f"extrap_{f.name}" for f in dataclasses.fields(ExtrapConfig)}
    return {name: value for name, value in mapping.items() if name not in tuning}


def _of_optimizer(fields: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, without those of their optimizer if what comes over them names another one."""
    named = {name: over[name] for name in OPTIMIZERS if over.get(name) is not None}
    if all(fields.get(name) == value for name, value in named.items()):
        return dict(fields)
    return {name: value for name, value in fields.items() if name not in (*OPTIMIZERS, *OF_OPTIMIZER)}


def _parse(parser: HfArgumentParser, words: list[str]) -> tuple[Namespace, list[str]]:
    try:
        return parser.parse_known_args(words)
    except ArgumentError as error:
        raise ValueError(f"{error}.") from error


def _word_name(word: str) -> str:
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else " (`hf-extrap train --help` lists all)"


def _complete(namespace: Namespace, given: Mapping[str, Any], name: str) -> None:
    if "output_dir" not in given:
        namespace.output_dir = str(Path("runs") / f"{name}-{namespace.extrap}-{namespace.seed}")
    # Without an accelerator the Trainer wants to be told, or its processes do not form a group.
    if "use_cpu" not in given and not torch.accelerator.is_available():
        namespace.use_cpu = True


def _build(parser: HfArgumentParser, namespace: Namespace) -> tuple[Any, ...]:
    values = vars(namespace)
    return tuple(
        kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init}) for kind in parser.dataclass_types
    )


def _check_processes(training_arguments: ExtrapTrainingArguments | ExtrapSeq2SeqTrainingArguments) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if training_arguments.world_size != launched:
        raise ValueError(
            f"{launched} processes were launched, but the process group has {training_arguments.world_size}; "
            "launch with torchrun, or with accelerate and one of configs/accelerate."
        )
    if training_arguments.n_gpu > 1:
        raise ValueError(
            f"one process sees {training_arguments.n_gpu} GPUs, and extrapolation needs one process for each; launch "
            f"with torchrun --nproc_per_node {training_arguments.n_gpu}, or choose one with CUDA_VISIBLE_DEVICES."
        )
