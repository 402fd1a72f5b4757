"""The content of a STUDY.yaml, read and checked."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hf_extrap.optim.config import PRESETS
from hf_extrap.recipes.configuration import read_mapping

RESERVED = ("extrap_virtual_workers", "seed", "output_dir", "resume_from_checkpoint", "save_model", "disable_tqdm")
"""Fields that a study sets for each run."""

STRICT = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


def number(value: Any) -> Any:
    """A number from the text that YAML makes of 1e-3, which has no point; any other value as it is."""
    try:
        found = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return value
    return found if math.isfinite(found) else value


Count = Annotated[int, Field(ge=1, le=2**31)]
Name = Annotated[str, Field(pattern=r"^[\w(][^\x00-\x1f\x7f/\\$`*\[\]<>|{}]{0,99}$")]
"""A name in folders, tables and figures."""
Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Fields = dict[str, Any]


@dataclass(frozen=True, config=STRICT)
class Range:
    """An interval that Optuna searches, on a logarithmic scale if `log`."""

    low: Number
    high: Number
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}; allowed: low < high, and low > 0 if log.")


Values = list[Annotated[Any, BeforeValidator(number)]] | Range


@dataclass(frozen=True, config=STRICT)
class Batch:
    """A batch size as a number of workers, each with the recipe's per-device batch; `fields` change with the batch."""

    workers: Count
    fields: Fields = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Method:
    """Fields of a method, and the fields that are searched for it, with their values.

    Attributes:
        scale_learning_rate: factor of the searched learning rates from the first batch to another one: `linear`, the
            ratio of their workers, or `sqrt`, its square root.
        workers: the batch sizes where it is tuned and run, each as its number of workers; all unless given.
    """

    search: dict[str, Values]
    fields: Fields = dataclasses.field(default_factory=dict)
    scale_learning_rate: Literal["none", "linear", "sqrt"] = "none"
    workers: list[int] | None = None


@dataclass(frozen=True, config=STRICT)
class Search:
    """How every method is tuned at every batch size: with the same number of trials."""

    kind: Literal["grid", "optuna"] = "grid"
    trials: Count = 1
    seed: int = 0


@dataclass(frozen=True, config=STRICT)
class Reference:
    """One method at one batch size."""

    method: str
    workers: int


@dataclass(frozen=True, config=STRICT)
class Target:
    """The target that steps are counted to: a value of a validation metric, or the final mean of a reference.

    Attributes:
        metric: the name of the metric; the leading one unless given.
        slack: the share of its mean by which a reference's target is easier: half of its own seeds end worse than
            their mean.
    """

    metric: str | None = None
    value: Number | None = None
    from_: Annotated[Reference | None, Field(alias="from")] = None
    slack: Number = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.slack < 1 or (self.slack and self.value is not None):
            raise ValueError(f"slack is {self.slack:g}; allowed: a share in [0, 1), beside from.")
        if (self.value is None) == (self.from_ is None):
            raise ValueError("value and from are both given, or neither; allowed: exactly one.")


@dataclass(frozen=True, config=STRICT)
class Study:
    """A study.

    Attributes:
        name: names its folder.
        config: the recipe that every run starts from; None for the task's defaults.
        fields: for every run, over the recipe; a batch's fields win over them, a method's over those, and the
            searched ones over all.
        batches, methods: every method is tuned and run at every batch size, or at its own `workers`.
        search: how it is tuned.
        tune_seeds: each trial is run with these; trials are ranked by their mean validation metric. Empty only with
            one trial, which needs no ranking.
        seeds: the best trial is run again with these, and only these are reported, on test.
        reference: the small-batch run whose score defines the generalization gap.
        baseline: the method that the others are compared with.
        target: for the steps, gradients and seconds to it.
    """

    name: Name
    config: Path | None
    batches: Annotated[list[Batch], Field(min_length=1)]
    methods: Annotated[dict[Name, Method], Field(min_length=1)]
    search: Search
    seeds: Annotated[list[int], Field(min_length=1)]
    tune_seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    fields: Fields = dataclasses.field(default_factory=dict)
    target: Target | None = None
    reference: Reference | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        batches = [batch.workers for batch in self.batches]
        for name, values in (("seeds", self.seeds), ("tune_seeds", self.tune_seeds), ("batches", batches)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} holds one twice: {values}; allowed: different ones.")
        if not self.tune_seeds and self.search.trials > 1:
            raise ValueError(f"tune_seeds is empty and search.trials is {self.search.trials}; allowed: at least one.")
        if both := sorted(set(self.seeds) & set(self.tune_seeds)):
            raise ValueError(
                f"seeds and tune_seeds both hold {both[0]}; allowed: different ones, so that no reported run was "
                "selected by its own score."
            )
        places = {"fields": self.fields, **{f"batches with {b.workers} workers": b.fields for b in self.batches}}
        if wrong := [where for where, fields in places.items() if "extrap" in fields]:
            raise ValueError(f"{wrong[0]} gives extrap; allowed: a method's fields.")
        for name, method in self.methods.items():
            self._check_method(f"methods.{name}", name, method)
            places |= {f"methods.{name}.fields": method.fields, f"methods.{name}.search": method.search}
        for where, fields in places.items():
            if reserved := [name for name in RESERVED if name in fields]:
                raise ValueError(f"{where} gives {reserved[0]}, which a study sets for each run.")
        start = self.target.from_ if self.target else None
        for where, found in (("baseline", self.baseline), ("reference", self.reference), ("target.from", start)):
            named = found.method if isinstance(found, Reference) else found
            if named is not None and named not in self.methods:
                where += ".method" * isinstance(found, Reference)
                raise ValueError(f"{where} is {named!r}; allowed: a method of the study, {listed(self.methods)}.")
            if isinstance(found, Reference) and found.workers not in (run := self.workers_of(found.method)):
                raise ValueError(
                    f"{where}: {named!r} does not run with {found.workers} workers; allowed: {listed(run)}."
                )

    def _check_method(self, where: str, name: str, method: Method) -> None:
        if "extrap" not in method.fields and name not in PRESETS:
            raise ValueError(f"{where} names no preset; give it `fields: {{extrap: …}}`, one of {listed(PRESETS)}.")
        batches, own = [batch.workers for batch in self.batches], method.workers
        if own is not None and (not own or len(set(own)) < len(own) or not set(own) <= {*batches}):
            raise ValueError(f"{where}.workers is {own}; allowed: different ones of {listed(batches)}.")
        for key, values in method.search.items():
            if isinstance(values, Range) and self.search.kind == "grid":
                raise ValueError(f"{where}.search.{key} is a range; allowed with search.kind grid: a list.")
            if isinstance(values, list) and (not values or len(set(map(str, values))) < len(values)):
                raise ValueError(f"{where}.search.{key} is {values}; allowed: a list of different values.")
        rates = method.search.get("learning_rate", [None])
        if method.scale_learning_rate != "none" and isinstance(rates, list):
            if not all(type(rate) in (int, float) for rate in rates):
                raise ValueError(f"{where} has scale_learning_rate; allowed: with numbers in search.learning_rate.")
        points = math.prod(len(values) for values in method.search.values() if isinstance(values, list))
        if self.search.kind == "grid" and points != self.search.trials:
            raise ValueError(
                f"{where}.search has {points} points and search.trials is {self.search.trials}; allowed: the same "
                "number for every method, so that all are tuned alike."
            )

    def workers_of(self, method: str) -> list[int]:
        """The batch sizes where a method is tuned and run, in the order of the batches."""
        chosen = self.methods[method].workers
        return [batch.workers for batch in self.batches if chosen is None or batch.workers in chosen]

    def values(self, method: str, workers: int) -> dict[str, Values]:
        """What is searched for a method at a batch size, the learning rates scaled to it."""
        found = self.methods[method]
        power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[found.scale_learning_rate]
        factor = (workers / self.batches[0].workers) ** power
        rates = found.search.get("learning_rate")
        if factor == 1 or rates is None:
            return dict(found.search)
        if isinstance(rates, Range):
            return found.search | {"learning_rate": Range(rates.low * factor, rates.high * factor, rates.log)}
        # Six digits: the name of a rate, without the rounding error of the product.
        return found.search | {"learning_rate": [float(f"{rate * factor:.6g}") for rate in rates]}


def read_study(path: str | Path) -> Study:
    """Read a study.

    Raises:
        FileNotFoundError: there is no such file, or not the recipe that it names.
        ValueError: in one sentence that names the place: something is missing, unknown, or not allowed.
    """
    path = Path(path)
    content = read_mapping(path)
    try:
        # JSON is where a strict reading takes text for a path and a mapping for a dataclass.
        study = TypeAdapter(Study).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise ValueError(f"{path}: {_sentence(error)}") from error
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{path} holds what no study can: {error}.") from error
    if study.config is None:
        return study
    for candidate in (study.config, path.parent / study.config):
        if candidate.is_file():
            return dataclasses.replace(study, config=candidate)
    raise FileNotFoundError(f"{path}: config {study.config} is neither in this folder nor beside the study.")


def _sentence(error: ValidationError) -> str:
    """The last error in one sentence: of the alternatives of a value, the last one is the mapping."""
    found = error.errors()[-1]
    # Pydantic adds the alternative of a union to the place.
    place = [part for part in found["loc"] if not str(part).startswith(("list[", "Range"))]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if found["type"] == "value_error":
        return f"{where}: {found['ctx']['error']}" if where else str(found["ctx"]["error"])
    if found["type"] == "unexpected_keyword_argument":
        kinds = (Study, Batch, Method, Search, Reference, Target, Range)
        names = {f.name.rstrip("_") for kind in kinds for f in dataclasses.fields(kind)}
        close = difflib.get_close_matches(str(place[-1]), names, n=1)
        return f"{where} is unknown" + (f" (did you mean {close[0]!r}?)." if close else ".")
    if found["type"].startswith("missing"):
        return f"{where} is missing."
    if found["type"] == "string_pattern_mismatch":
        where = where.removesuffix(".[key]")
        allowed = "at most 100 characters, the first a letter or a digit, none of / \\\\ $ ` * [ ] < > | { }"
        return f"{where}: {found['input']!r:.60} is no name; allowed: {allowed}."
    if found["type"] == "too_short":
        return f"{where} is empty; allowed: at least one."
    allowed = found["msg"].removeprefix("Input should be ").replace("array", "list")
    return f"{where or 'the study'} is {found['input']!r:.200}; allowed: {allowed}."


def listed(names: Iterable[Any]) -> str:
    """The names, separated by commas."""
    return ", ".join(map(str, names))
