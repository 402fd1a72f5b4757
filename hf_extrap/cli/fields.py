"""The words of commands that take a configuration: its path, if any, then `--field value …`; and the fields' help."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hf_extrap.recipes.task import Task

CONFIGURED = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONFIG.yaml --field value", hidden=True),
]
"""The words of a command that Typer does not know, in their order."""

TRAINING = (
    "learning_rate max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps optim "
    "lr_scheduler_type warmup_steps eval_strategy save_strategy logging_steps seed output_dir resume_from_checkpoint "
    "bf16 report_to"
).split()
"""Fields of `TrainingArguments` that the short help lists."""


def path_and_fields(words: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """Divide the words into the path, None if they begin with a field, and the fields."""
    words = list(words or ())
    return (words[0], words[1:]) if words and not words[0].startswith("-") else (None, words)


def print_fields(task: Task) -> None:
    """Print the fields of a task's run by group, one line each."""
    from hf_extrap.recipes.configuration import make_parser
    from hf_extrap.recipes.data import DataArguments
    from hf_extrap.training.arguments import ExtrapArguments

    run, own, training = make_parser(task).dataclass_types
    inherited = {field.name for field in dataclasses.fields(DataArguments)}
    groups = {
        "Run": _fields(run),
        "Data and model": _fields(DataArguments),
        f"Task {task.name}": (field for field in _fields(own) if field.name not in inherited),
        "Extrapolation": (field for field in _fields(ExtrapArguments) if field.name.startswith("extrap")),
        "Large batches": (field for field in _fields(ExtrapArguments) if not field.name.startswith("extrap")),
        "Trainer, the usual ones": (field for field in _fields(training) if field.name in TRAINING),
    }
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    for title, fields in groups.items():
        typer.echo(f"\n{title}:")
        for field in fields:
            text = " ".join(str(field.metadata.get("help", "")).split()).removesuffix(" Overrides the preset.")
            line = f"  --{field.name:<28}{text.split('. ')[0].removesuffix('.')}{_default(field)}"
            typer.echo(line if len(line) <= width else f"{line[: width - 1]}…")


def _fields(kind: Any) -> Iterator[Any]:
    return (field for field in dataclasses.fields(kind) if field.init)


def _default(field: Any) -> str:
    default = getattr(field.default, "value", field.default)
    return "" if default in (None, "", dataclasses.MISSING) else f" [{default}]"
