"""Comparison of presets: a study of one batch size, from the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from hf_extrap.lab.study.report import report_study
from hf_extrap.lab.study.runner import run_study
from hf_extrap.lab.study.specification import Batch, Method, Reference, Search, Study, Target
from hf_extrap.optim.config import PRESETS
from hf_extrap.recipes.configuration import resolve

T = TypeVar("T")


def parse_list(name: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The values of a comma-separated option.

    Raises:
        ValueError: it is empty, holds a value twice, or one that is not of the kind.
    """
    try:
        values = [kind(item.strip()) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise ValueError(f"--{name} is {text!r}; allowed: {kind.__name__} values separated by commas.") from error
    if not values or len(set(values)) < len(values):
        raise ValueError(f"--{name} is {text!r}; allowed: one or more different values separated by commas.")
    return values


def compare(study: Study, output_dir: str | Path | None = None, command: str = "hf-extrap compare") -> int:
    """Run the study of `comparison`, and report it; a run that is done is not repeated.

    Args:
        study: what `comparison` returns.
        output_dir: default `runs/compare-<config>`.
        command: the command line, for the record.

    Returns:
        The exit code: 0; 1 if a run failed; 130 after Ctrl-C.

    Raises:
        ValueError: something in the comparison cannot be; nothing has run.
    """
    folder = Path(output_dir or Path("runs") / f"compare-{study.name}")
    code = run_study(study, output_dir=folder, command=command)
    if code != 130:
        report_study(study, folder, command)
    return code


def comparison(
    config: str | Path | None,
    words: Sequence[str],
    presets: Sequence[str],
    seeds: Sequence[int],
    learning_rates: Sequence[float] | None = None,
    target: float | None = None,
) -> Study:
    """The study of presets on the same data order, with the same initial weights for each seed.

    Args:
        config: YAML file, or None for the task's defaults.
        words: `--field value …` for every run.
        presets: names of presets, each with fields of its own if wanted: `extrap:step_ratio=0.25`. The others are
            compared with the first one.
        seeds: a seed sets the initial weights, the data order and all noise.
        learning_rates: each preset is tuned over these, by validation, with a seed that is not reported; None: the
            configuration's.
        target: value of the metric for "steps to target"; None: the mean that the first preset ends at.

    Raises:
        ValueError: a preset or a field is not allowed.
    """
    named = {word[2:].split("=")[0].replace("-", "_").removeprefix("no_") for word in words if word[:2] == "--"}
    for name, option in {"extrap": "presets", "seed": "seeds", "learning_rate": "learning_rates"}.items():
        if name in named:
            raise ValueError(f"--{name}: a comparison sets it for each run; use --{option}.")
    methods = {preset: _method(preset, learning_rates) for preset in presets}
    resolved = resolve(config, words)
    arguments = resolved.training_arguments
    workers = arguments.extrap_virtual_workers
    evaluated = getattr(arguments.eval_strategy, "value", arguments.eval_strategy) != "no"
    first = Reference(presets[0], workers)
    return Study(
        # The name of a study has no other characters.
        name=re.sub(r"[^\w .-]|^[^\w]", "_", Path(config).stem)[:100] if config else resolved.task.name,
        config=Path(config) if config else None,
        fields={name: value for name, value in resolved.given.items() if name in named - {"extrap_virtual_workers"}},
        batches=[Batch(workers)],
        methods=methods,
        search=Search(trials=len(learning_rates or [None])),
        # A choice among learning rates is by a seed that is not reported.
        tune_seeds=[max(seeds) + 1] if len(learning_rates or []) > 1 else [],
        seeds=list(seeds),
        target=(Target(from_=first) if target is None else Target(value=target)) if evaluated else None,
        baseline=presets[0] if len(presets) > 1 else None,
    )


def _method(preset: str, learning_rates: Sequence[float] | None) -> Method:
    """A preset with fields of its own, written `name` or `name:field=value:field=value`."""
    name, *fields = preset.split(":")
    if name not in PRESETS:
        raise ValueError(f"--presets: {name!r} is no preset; allowed: {', '.join(PRESETS)}.")
    if bad := [item for item in fields if "=" not in item]:
        raise ValueError(f"--presets: {bad[0]!r} in {preset!r} is not field=value.")
    own = {f"extrap_{key}": value for key, _, value in (item.partition("=") for item in fields)}
    return Method({"learning_rate": list(learning_rates)} if learning_rates else {}, {"extrap": name, **own})
