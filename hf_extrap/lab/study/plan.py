"""Which runs a study needs, and which of them can begin, given the rows of those that are done."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_extrap.lab.study.search import Point, corners, grid, suggest
from hf_extrap.lab.study.specification import Study
from hf_extrap.recipes.configuration import Configuration, read_mapping, resolve, to_words
from hf_extrap.recipes.run_folder import UNCOMPARED, plain

Row = dict[str, Any]
Rows = Mapping[str, Row]
"""The row of each run that is done, by its fingerprint."""

DEFAULTS: dict[str, Any] = {
    "abort_factor": 3.0,
    # The loss of the untrained model, which divergence is told by.
    "logging_first_step": True,
    "evaluate_untrained": False,
}
"""Fields of every run unless the recipe or the study gives them."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        stage: `tune`, ranked on validation, or `final`, reported on test.
        trial: the number of the point among those of its method at its batch size.
        point: the searched fields.
        words: `--field value …` over the recipe.
        fingerprint: of its resolved fields: rows are matched by it.
    """

    stage: Literal["tune", "final"]
    method: str
    workers: int
    trial: int
    point: Point
    seed: int
    words: tuple[str, ...] = field(repr=False)
    fingerprint: str

    @property
    def label(self) -> str:
        """The run, as the reader is told."""
        shown = ", ".join(f"{name} {_short(value)}" for name, value in self.point.items())
        return f"{self.stage} {self.method} × {self.workers} ({shown}; seed {self.seed})"


def fingerprint(given: Mapping[str, Any]) -> str:
    """A hash of the fields that decide a run's numbers."""
    fields = plain({name: value for name, value in given.items() if name not in UNCOMPARED})
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


class Chain:
    """One method at one batch size: its trials, then its best trial with the seeds that are reported."""

    def __init__(self, study: Study, method: str, workers: int) -> None:
        self.study, self.method, self.workers = study, method, workers
        self.values = study.values(method, workers)
        self._cells: dict[str, Cell] = {}
        self._suggested: dict[tuple[float, ...], Point] = {}
        recipe = read_mapping(study.config)
        self._fields = {
            **{name: value for name, value in DEFAULTS.items() if name not in recipe},
            **study.fields,
            **study.batch(workers).fields,
            "extrap": method,
            **study.methods[method].fields,
        }

    @property
    def size(self) -> int:
        """How many runs it has in the end."""
        return self.study.search.trials * len(self.study.tune_seeds) + len(self.study.seeds)

    def check(self) -> list[Configuration]:
        """Resolve all its points, or the ends of their ranges, without running any.

        Raises:
            ValueError: a field is unknown, or a value is not allowed.
        """
        points = grid(self.values) if self.study.search.kind == "grid" else corners(self.values)
        try:
            return [self._resolve(point, self.study.seeds[0]) for point in points]
        except ValueError as error:
            raise ValueError(f"method {self.method!r} with {self.workers} workers: {error}") from error

    def points(self, rows: Rows) -> list[Point]:
        """The points that are known: all of a grid; of Optuna's, those that the rows hold, and one more."""
        if self.study.search.kind == "grid":
            return grid(self.values)
        points: list[Point] = []
        recorded = self._recorded(rows)
        earlier: list[tuple[Point, float]] = []
        for number in range(self.study.search.trials):
            point = recorded.get(number)
            if point is None:
                point = self._suggest(number, earlier, _greater_is_better(rows))
            points.append(point)
            cells = self.tuning(number, point)
            if not all(cell.fingerprint in rows for cell in cells):
                break
            earlier.append((point, self.score(cells, rows)))
        return points

    def _suggest(self, number: int, earlier: list[tuple[Point, float]], greater_is_better: bool) -> Point:
        key = (number, *(score for _, score in earlier))
        if key not in self._suggested:
            self._suggested[key] = suggest(self.values, earlier, self.study.search.seed + number, greater_is_better)
        return self._suggested[key]

    def _recorded(self, rows: Rows) -> dict[int, Point]:
        found = {}
        for row in rows.values():
            if (row["stage"], row["method"], row["workers"]) == ("tune", self.method, self.workers):
                point, number = row["point"], row["trial"]
                same = set(point) == set(self.values) and row["seed"] in self.study.tune_seeds
                if same and self._cell("tune", number, point, row["seed"]).fingerprint == row["fingerprint"]:
                    found[number] = point
        return found

    def tuning(self, number: int, point: Point) -> list[Cell]:
        """The runs of one trial."""
        return [self._cell("tune", number, point, seed) for seed in self.study.tune_seeds]

    def cells(self, rows: Rows) -> list[Cell]:
        """The runs that are known: the trials, and once they are done the final runs of the best one."""
        points = self.points(rows)
        tuning = [cell for number, point in enumerate(points) for cell in self.tuning(number, point)]
        best = self.best(rows)
        return tuning + ([self._cell("final", *best, seed) for seed in self.study.seeds] if best else [])

    def is_tuned(self, rows: Rows) -> bool:
        """Whether all its trials are done."""
        points = self.points(rows)
        done = all(cell.fingerprint in rows for n, point in enumerate(points) for cell in self.tuning(n, point))
        return done and len(points) == self.study.search.trials

    def best(self, rows: Rows) -> tuple[int, Point] | None:
        """The best trial, or None while trials are missing, and if every one diverged or failed."""
        if not self.is_tuned(rows):
            return None
        scores = [(self.score(self.tuning(n, point), rows), n, point) for n, point in enumerate(self.points(rows))]
        finite = [entry for entry in scores if math.isfinite(entry[0])]
        if not finite:
            return None
        sign = -1 if _greater_is_better(rows) else 1
        _, number, point = min(finite, key=lambda entry: sign * entry[0])
        return number, point

    def score(self, cells: list[Cell], rows: Rows) -> float:
        """The mean validation metric of runs that are done; infinitely bad if one of them diverged or failed."""
        found = [rows[cell.fingerprint] for cell in cells]
        if any(row["status"] != "finished" for row in found):
            return -math.inf if _greater_is_better(rows) else math.inf
        return sum(row["validation"][row["metric"]] for row in found) / len(found)

    def _resolve(self, point: Point, seed: int) -> Configuration:
        return resolve(self.study.config, self._words(point, seed))

    def _words(self, point: Point, seed: int) -> tuple[str, ...]:
        fields = {**self._fields, **point}
        if empty := [name for name, value in fields.items() if value is None]:
            raise ValueError(f"{empty[0]} is null; allowed in a study: a value.")
        own = {"extrap_virtual_workers": self.workers, "seed": seed, "save_model": False, "disable_tqdm": True}
        return tuple(to_words({**fields, **own}))

    def _cell(self, stage: Literal["tune", "final"], number: int, point: Point, seed: int) -> Cell:
        words = self._words(point, seed)
        key = f"{stage} {number} {' '.join(words)}"
        if key not in self._cells:
            given = resolve(self.study.config, words).given
            self._cells[key] = Cell(stage, self.method, self.workers, number, point, seed, words, fingerprint(given))
        return self._cells[key]


class Plan:
    """All runs of a study: for each batch size the methods that run there, in the order of the file."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.chains = [
            Chain(study, method, batch.workers)
            for batch in study.batches
            for method in study.methods
            if batch.workers in study.workers_of(method)
        ]

    def check(self) -> None:
        """Resolve every run of the study that is known, without running any.

        Raises:
            ValueError: a run cannot be, or does not measure what the report needs.
        """
        for chain in self.chains:
            for found in chain.check():
                strategy = found.training_arguments.eval_strategy
                if self.study.target is not None and getattr(strategy, "value", strategy) == "no":
                    raise ValueError(
                        f"target needs evaluations during training, and eval_strategy is 'no' for {chain.method!r} "
                        f"with {chain.workers} workers; allowed: steps (with eval_steps), epoch."
                    )

    @property
    def size(self) -> int:
        """How many runs the study has in the end."""
        return sum(chain.size for chain in self.chains)

    def cells(self, rows: Rows) -> list[Cell]:
        """The runs that are known."""
        return [cell for chain in self.chains for cell in chain.cells(rows)]

    def ready(self, rows: Rows) -> list[Cell]:
        """The runs that can begin: known, and not done; one of each fingerprint."""
        waiting = {cell.fingerprint: cell for cell in self.cells(rows) if cell.fingerprint not in rows}
        return list(waiting.values())

    def left(self, rows: Rows) -> int:
        """How many runs are still to do, those included that are not known yet."""
        known = sum(cell.fingerprint not in rows for cell in self.cells(rows))
        unknown = sum(
            chain.size - len(chain.cells(rows))
            for chain in self.chains
            if not (chain.is_tuned(rows) and chain.best(rows) is None)
        )
        return known + unknown


def _greater_is_better(rows: Rows) -> bool:
    return bool(next((row["greater_is_better"] for row in rows.values() if row.get("metric")), False))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
