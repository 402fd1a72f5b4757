"""Which runs a study needs, and which of them can begin, given the rows of those that are done."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from hf_extrap.lab.study.rows import Row
from hf_extrap.lab.study.search import Point, corners, grid, suggest
from hf_extrap.lab.study.specification import Study
from hf_extrap.recipes.configuration import Configuration, read_mapping, resolve, to_words
from hf_extrap.recipes.run_folder import UNCOMPARED, plain

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
        study: name of the study.
        stage: `tune`, ranked on validation, or `final`, reported on test.
        trial: the number of the point among those of its method at its batch size.
        point: the searched fields.
        fingerprint: of its resolved fields: rows are matched by it.
        config: the recipe.
        words: `--field value …` over the recipe.
    """

    study: str
    stage: Literal["tune", "final"]
    method: str
    workers: int
    trial: int
    point: Point
    seed: int
    fingerprint: str
    config: Path | None = None
    words: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The run, as the progress shows it."""
        short = {name: f"{value:g}" if isinstance(value, float) else value for name, value in self.point.items()}
        shown = ", ".join(f"{name} {value}" for name, value in short.items())
        return f"{self.stage} {self.method} × {self.workers} ({shown}; seed {self.seed})"

    @property
    def identity(self) -> Row:
        """The fields that a row of this run begins with, whatever its status."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("config", "words")}


@dataclass(frozen=True)
class Trial:
    """One point of a method at a batch size, with its runs.

    Attributes:
        score: the mean validation metric of the runs that are done; infinitely bad if one of them diverged or failed.
    """

    number: int
    point: Point
    cells: list[Cell]
    is_done: bool
    score: float


def fingerprint(given: Mapping[str, Any]) -> str:
    """A hash of the fields that decide a run's numbers."""
    fields = plain({name: value for name, value in given.items() if name not in UNCOMPARED})
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


class Chain:
    """One method at one batch size: its trials, then its best trial with the seeds that are reported."""

    def __init__(self, study: Study, method: str, workers: int) -> None:
        self.study, self.method, self.workers = study, method, workers
        self.values = study.values(method, workers)
        self._cells: dict[tuple[str, ...], Cell] = {}
        self._suggested: dict[tuple[float, ...], Point] = {}
        recipe = read_mapping(study.config) if study.config else {}
        batch = next(batch for batch in study.batches if batch.workers == workers)
        self._fields = {
            **{name: value for name, value in DEFAULTS.items() if name not in recipe},
            **study.fields,
            **batch.fields,
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
            return [resolve(self.study.config, self._words(point, self.study.seeds[0])) for point in points]
        except ValueError as error:
            raise ValueError(f"method {self.method!r} with {self.workers} workers: {error}") from error

    def trials(self, rows: Rows) -> list[Trial]:
        """The trials that are known: all of a grid; of Optuna's, those that the rows hold, and one more."""
        if self.study.search.kind == "grid":
            return [self._trial(number, point, rows) for number, point in enumerate(grid(self.values))]
        recorded = self._recorded(rows)
        trials: list[Trial] = []
        while len(trials) < self.study.search.trials and all(trial.is_done for trial in trials):
            number, key = len(trials), tuple(trial.score for trial in trials)
            if number not in recorded and key not in self._suggested:
                earlier, seed = [(trial.point, trial.score) for trial in trials], self.study.search.seed + number
                self._suggested[key] = suggest(self.values, earlier, seed, _greater_is_better(rows))
            trials.append(self._trial(number, recorded.get(number) or self._suggested[key], rows))
        return trials

    def _recorded(self, rows: Rows) -> dict[int, Point]:
        """The points of the rows: another release of Optuna would suggest others."""
        ours = ("tune", self.method, self.workers, set(self.values))
        found: dict[int, Point] = {}
        for row in rows.values():
            if (row["stage"], row["method"], row["workers"], set(row["point"])) == ours:
                cell = self._cell("tune", row["trial"], row["point"], row["seed"])
                if cell.fingerprint == row["fingerprint"]:
                    found[cell.trial] = cell.point
        return found

    def _trial(self, number: int, point: Point, rows: Rows) -> Trial:
        cells = [self._cell("tune", number, point, seed) for seed in self.study.tune_seeds]
        done = [rows[cell.fingerprint] for cell in cells if cell.fingerprint in rows]
        score = -math.inf if _greater_is_better(rows) else math.inf
        if done and all(row["status"] == "finished" for row in done):
            score = sum(row["validation"][row["metric"]] for row in done) / len(done)
        return Trial(number, point, cells, len(done) == len(cells), score)

    def best(self, rows: Rows) -> Trial | None:
        """The best trial, or None while trials are missing, and if every one diverged or failed."""
        trials = self.trials(rows)
        if sum(trial.is_done for trial in trials) < self.study.search.trials:
            return None
        if not self.study.tune_seeds:
            return trials[0]
        sign = -1 if _greater_is_better(rows) else 1
        finite = [trial for trial in trials if math.isfinite(trial.score)]
        return min(finite, key=lambda trial: sign * trial.score, default=None)

    def is_hopeless(self, rows: Rows) -> bool:
        """Whether all its trials are done and every one diverged or failed: no run is left."""
        done = sum(trial.is_done for trial in self.trials(rows))
        return done == self.study.search.trials and self.best(rows) is None

    def left(self, rows: Rows) -> int:
        """How many runs are still to do."""
        cells = self.cells(rows)
        total = len(cells) if self.is_hopeless(rows) else self.size
        return total - sum(cell.fingerprint in rows for cell in cells)

    def cells(self, rows: Rows) -> list[Cell]:
        """The runs that are known: the trials, and once they are done the final runs of the best one."""
        best = self.best(rows)
        finals = [self._cell("final", best.number, best.point, seed) for seed in self.study.seeds] if best else []
        return [cell for trial in self.trials(rows) for cell in trial.cells] + finals

    def _words(self, point: Point, seed: int) -> tuple[str, ...]:
        fields = {**self._fields, **point}
        if empty := [name for name, value in fields.items() if value is None]:
            raise ValueError(f"{empty[0]} is null; allowed in a study: a value.")
        own = {"extrap_virtual_workers": self.workers, "seed": seed, "save_model": False, "disable_tqdm": True}
        return tuple(to_words({**fields, **own}))

    def _cell(self, stage: Literal["tune", "final"], number: int, point: Point, seed: int) -> Cell:
        study, words = self.study, self._words(point, seed)
        key = (stage, str(number), *words)
        if key not in self._cells:
            given = fingerprint(resolve(study.config, words).given)
            self._cells[key] = Cell(
                study.name, stage, self.method, self.workers, number, point, seed, given, study.config, words
            )
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
        return list({cell.fingerprint: cell for cell in self.cells(rows) if cell.fingerprint not in rows}.values())

    def left(self, rows: Rows) -> int:
        """How many runs are still to do, those included that are not known yet."""
        return sum(chain.left(rows) for chain in self.chains)


def _greater_is_better(rows: Rows) -> bool:
    return bool(next((row["greater_is_better"] for row in rows.values() if row.get("metric")), False))
