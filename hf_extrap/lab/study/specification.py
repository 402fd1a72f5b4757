"""What a STUDY.yaml says, read and checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_extrap.lab.study.mapping import build, listed, number
from hf_extrap.optim.config import PRESETS
from hf_extrap.recipes.configuration import read_mapping

RESERVED = ("extrap_virtual_workers", "seed", "output_dir", "resume_from_checkpoint", "save_model", "disable_tqdm")
"""Fields that a study sets for each run."""


@dataclass(frozen=True)
class Range:
    """An interval that Optuna searches, on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = number(getattr(self, name))
            if value is None:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: a finite number.")
            object.__setattr__(self, name, value)
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}; allowed: low < high, and low > 0 if log.")

    def scaled(self, factor: float) -> Range:
        """The same range times a factor."""
        return Range(self.low * factor, self.high * factor, self.log)


Values = list[Any] | Range


@dataclass(frozen=True)
class Batch:
    """A batch size as a number of workers, each with the recipe's per-device batch; `fields` change with the batch."""

    workers: int
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; allowed: a whole number >= 1.")


@dataclass(frozen=True)
class Method:
    """Fields of a method, and those that are searched for it, with their values.

    Attributes:
        scale_learning_rate: by what the searched learning rates grow from the first batch to another one:
            `linear`, the ratio of their workers, or `sqrt`, its square root.
        workers: the batch sizes where it is tuned and run, each as its number of workers; all unless given.
    """

    search: dict[str, Values]
    fields: dict[str, Any] = field(default_factory=dict)
    scale_learning_rate: Literal["none", "linear", "sqrt"] = "none"
    workers: list[int] | None = None

    def __post_init__(self) -> None:
        read = {key: list(map(_read, v)) if isinstance(v, list) else v for key, v in self.search.items()}
        object.__setattr__(self, "search", read)


@dataclass(frozen=True)
class Search:
    """How every method is tuned at every batch size: with the same number of trials."""

    kind: Literal["grid", "optuna"] = "grid"
    trials: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}; allowed: a whole number >= 1.")


@dataclass(frozen=True)
class Reference:
    """One method at one batch size."""

    method: str
    workers: int


@dataclass(frozen=True)
class Target:
    """What "to target" means: a value of a metric of validation, or the final mean of a reference.

    Attributes:
        slack: the share of its mean by which a reference's target is easier: half of its own seeds end worse than
            their mean.
    """

    metric: str
    value: float | None = None
    from_: Reference | None = None
    slack: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.slack < 1 or (self.slack and self.value is not None):
            raise ValueError(f"slack is {self.slack:g}; allowed: a share in [0, 1), beside from.")
        if (self.value is None) == (self.from_ is None):
            raise ValueError("value and from are both given, or neither; allowed: exactly one.")


@dataclass(frozen=True)
class Study:
    """A study, as its file says.

    Attributes:
        name: names its folder.
        config: the recipe that every run starts from.
        fields: for every run, over the recipe; a batch's fields win over them, a method's over those, and the
            searched ones over all.
        batches, methods: every method is tuned and run at every batch size, or at its own `workers`.
        search: how it is tuned.
        tune_seeds: each trial is run with these; trials are ranked by their mean validation metric.
        seeds: the best trial is run again with these, and only these are reported, on test.
        reference: the small-batch run whose score defines the generalization gap.
        baseline: the method that the others are compared with.
        target: for the steps, gradients and seconds to it.
    """

    name: str
    config: Path
    batches: list[Batch]
    methods: dict[str, Method]
    search: Search
    seeds: list[int]
    tune_seeds: list[int] = field(default_factory=lambda: [0])
    fields: dict[str, Any] = field(default_factory=dict)
    target: Target | None = None
    reference: Reference | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        for name in ("batches", "methods", "seeds", "tune_seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; allowed: at least one.")
        workers = [batch.workers for batch in self.batches]
        for name, values in (("seeds", self.seeds), ("tune_seeds", self.tune_seeds), ("batches", workers)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} holds one twice: {values}; allowed: different ones.")
        if both := sorted(set(self.seeds) & set(self.tune_seeds)):
            raise ValueError(
                f"seeds and tune_seeds both hold {both[0]}; allowed: different ones, or the report is of runs that "
                "were chosen for their luck."
            )
        for name, method in self.methods.items():
            self._check_method(name, method)
        for name, found in (("reference", self.reference), ("target.from", self.target.from_ if self.target else None)):
            if found is not None:
                if found.workers not in workers:
                    raise ValueError(f"{name}: no batch has {found.workers} workers; allowed: {listed(workers)}.")
                self._check_name(f"{name}.method", found.method)
                if found.workers not in (run := self.workers_of(found.method)):
                    raise ValueError(
                        f"{name}: {found.method!r} does not run with {found.workers} workers; allowed: {listed(run)}."
                    )
        self._check_name("baseline", self.baseline)

    def _check_name(self, where: str, method: str | None) -> None:
        if method is not None and method not in self.methods:
            raise ValueError(f"{where} is {method!r}; allowed: a method of the study, {listed(self.methods)}.")

    def _check_method(self, name: str, method: Method) -> None:
        if "extrap" not in method.fields and name not in PRESETS:
            raise ValueError(
                f"methods.{name} names no preset; give it `fields: {{extrap: …}}`, one of {listed(PRESETS)}."
            )
        if method.workers is not None:
            workers = [batch.workers for batch in self.batches]
            if not method.workers or len(set(method.workers)) < len(method.workers):
                raise ValueError(
                    f"methods.{name}.workers is {method.workers}; allowed: different ones of {listed(workers)}."
                )
            if unknown := [count for count in method.workers if count not in workers]:
                raise ValueError(
                    f"methods.{name}.workers: no batch has {unknown[0]} workers; allowed: {listed(workers)}."
                )
        for key, values in method.search.items():
            if isinstance(values, Range) and self.search.kind == "grid":
                raise ValueError(f"methods.{name}.search.{key} is a range; allowed with search.kind grid: a list.")
            if isinstance(values, list) and (not values or len(set(map(str, values))) < len(values)):
                raise ValueError(f"methods.{name}.search.{key} is {values}; allowed: a list of different values.")
        rates = method.search.get("learning_rate")
        if method.scale_learning_rate != "none":
            if rates is None:
                raise ValueError(f"methods.{name} has scale_learning_rate and searches no learning_rate.")
            if isinstance(rates, list) and None in map(number, rates):
                raise ValueError(f"methods.{name}.search.learning_rate is {rates}; allowed: numbers.")
        if self.search.kind == "grid":
            points = math.prod(len(values) for values in method.search.values() if isinstance(values, list))
            if points != self.search.trials:
                raise ValueError(
                    f"methods.{name}.search has {points} points and search.trials is {self.search.trials}; allowed: "
                    "the same number for every method, so that all are tuned alike."
                )

    def workers_of(self, method: str) -> list[int]:
        """The batch sizes where a method is tuned and run, in the order of the batches."""
        chosen = self.methods[method].workers
        return [batch.workers for batch in self.batches if chosen is None or batch.workers in chosen]

    def batch(self, workers: int) -> Batch:
        """The batch with so many workers."""
        return next(batch for batch in self.batches if batch.workers == workers)

    def values(self, method: str, workers: int) -> dict[str, Values]:
        """What is searched for a method at a batch size, the learning rates scaled to it."""
        found = self.methods[method]
        power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[found.scale_learning_rate]
        factor = (workers / self.batches[0].workers) ** power
        if factor == 1:
            return dict(found.search)
        return {key: _scaled(v, factor) if key == "learning_rate" else v for key, v in found.search.items()}


def read_study(path: str | Path) -> Study:
    """Read a study.

    Raises:
        FileNotFoundError: there is no such file, or not the recipe that it names.
        ValueError: in one sentence that names the place: something is missing, unknown, or not allowed.
    """
    path = Path(path)
    content = read_mapping(path)
    try:
        study: Study = build(Study, content)
        _refuse_reserved(study)
        return dataclasses.replace(study, config=_find_config(path, study.config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _find_config(path: Path, config: Path) -> Path:
    for candidate in (config, path.parent / config):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{path}: config {config} is neither in this folder nor beside the study.")


def _refuse_reserved(study: Study) -> None:
    places: list[tuple[str, Mapping[str, Any]]] = [("fields", study.fields)]
    places += [(f"batches with {batch.workers} workers", batch.fields) for batch in study.batches]
    for name, method in study.methods.items():
        places += [(f"methods.{name}.fields", method.fields), (f"methods.{name}.search", method.search)]
    for where, fields in places[: 1 + len(study.batches)]:
        if "extrap" in fields:
            raise ValueError(f"{where} gives extrap; allowed: a method's fields.")
    for where, fields in places:
        if found := [name for name in RESERVED if name in fields]:
            raise ValueError(f"{where} gives {found[0]}, which a study sets for each run.")


def _read(value: Any) -> Any:
    """A number that YAML took for text, such as 1e-3."""
    found = number(value) if isinstance(value, str) else None
    return value if found is None else found


def _scaled(values: Values, factor: float) -> Values:
    if isinstance(values, Range):
        return values.scaled(factor)
    # Six digits: the name of a rate, not the noise of a multiplication.
    return [float(f"{value * factor:.6g}") for value in values]
