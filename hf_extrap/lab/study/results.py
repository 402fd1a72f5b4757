"""Results of a study: each method at each batch size, at its best settings, over the seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hf_extrap.lab.study.folder import StudyFolder
from hf_extrap.lab.study.plan import Chain, Plan, Rows
from hf_extrap.lab.study.rows import Row
from hf_extrap.lab.study.search import Point
from hf_extrap.lab.study.specification import Reference, Study, Target
from hf_extrap.lab.study.statistics import (
    Estimate,
    estimate,
    gap_closed,
    gradients_per_step,
    paired_difference,
    steps_to,
)
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.training.figures import series

PERFECT_SCALING_MARGIN = 1.2
"""A batch size is within perfect scaling up to so many times the steps that it would take."""

SHARPNESS = "extrap/sharpness"
"""The key of a history under which a run with `sharpness_batches` logs it."""


@dataclass
class Entry:
    """One method at one batch size.

    Attributes:
        trials: the mean validation score of each trial that is done, infinite if it diverged or failed.
        finals: the rows of the reported seeds that are done; `histories` are theirs.
        point: the best trial's settings; None while trials are missing, and if no trial trained.
        to_target: estimates of `steps`, `gradients` and `seconds` over the seeds that reached the target.
        scaling: steps that perfect scaling from the reference would take, over steps to the target.
        sharpness: the largest Hessian eigenvalue where training ended, as it was last logged; None if it never was.
        sharpness_difference: the same minus that of the baseline, paired by seed.
    """

    method: str
    workers: int
    trials: list[tuple[Point, float]]
    tuning: list[Row]
    finals: list[Row]
    histories: list[list[Row]]
    trials_planned: int
    seeds_planned: int
    point: Point | None
    batch_size: float | None = None
    test: Estimate | None = None
    validation: Estimate | None = None
    difference: Estimate | None = None
    gap_closed: float | None = None
    to_target: dict[str, Estimate | None] = field(default_factory=dict)
    seconds_per_step: float | None = None
    relative_seconds: float | None = None
    scaling: float | None = None
    sharpness: Estimate | None = None
    sharpness_difference: Estimate | None = None

    @property
    def finished(self) -> list[Row]:
        """The final runs that did not diverge or fail."""
        return [row for row in self.finals if row["status"] == "finished"]

    @property
    def diverged_trials(self) -> int:
        """How many tuning runs diverged."""
        return sum(row["status"] == "diverged" for row in self.tuning)

    @property
    def largest_learning_rate(self) -> float | None:
        """The largest peak learning rate of a tuning run that ended below its first loss; None if none did."""
        rates = []
        for row in self.tuning:
            losses = row.get("first_loss"), row.get("validation", {}).get("loss")
            if row["status"] == "finished" and (None in losses or losses[1] < losses[0]):
                rates.append(row["peak_learning_rate"])
        return max(rates, default=None)

    @property
    def reached_by_all(self) -> Estimate | None:
        """Steps to the target, if every seed reached it."""
        steps = self.to_target.get("steps")
        return steps if steps is not None and steps.count == self.seeds_planned else None

    def scores(self, split: str) -> dict[int, float]:
        """The leading metric of each seed that finished."""
        return {row["seed"]: row[split][row["metric"]] for row in self.finished if row[split]}

    def sharpness_by_seed(self) -> dict[int, float]:
        """The last sharpness that each finished seed has logged, by its seed."""
        values = [series(history, SHARPNESS)[1] for history in self.histories]
        logged = zip(self.finals, values, strict=True)
        return {row["seed"]: found[-1] for row, found in logged if row["status"] == "finished" and found}


@dataclass
class Results:
    """A study's entries, in the order of its file, and what they are measured with.

    Attributes:
        metric: the leading metric.
        split: the one that is reported: test, or validation where there is none.
        target: the value of `target_metric` that the steps are counted to; None if there is none, or not yet.
        missing: what is not done yet, a sentence part for each method and batch size.
        left, size: how many runs are to do, and how many there are in the end.
    """

    study: Study
    entries: list[Entry]
    metric: str
    greater_is_better: bool
    split: str
    target_metric: str | None
    target: float | None
    missing: list[str]
    left: int
    size: int

    def of(self, reference: Reference | None) -> Entry | None:
        """The entry that a study's file refers to."""
        place = (reference.method, reference.workers) if reference else None
        return next((entry for entry in self.entries if (entry.method, entry.workers) == place), None)

    @property
    def target_is_greater(self) -> bool:
        """Whether larger values of the target's metric are better."""
        return self.greater_is_better and self.target_metric not in ("loss", "perplexity")

    @property
    def scaling_start(self) -> tuple[float, float] | None:
        """Batch size and steps of the reference, where all its seeds reached the target: the start of perfect scaling.

        From there on, twice the batch would take half the steps.
        """
        entry = self.of(self.study.reference)
        if entry is None or entry.batch_size is None or entry.reached_by_all is None:
            return None
        return entry.batch_size, entry.reached_by_all.mean

    @property
    def largest_scaling_batch(self) -> dict[str, float]:
        """For each method, the largest batch that takes at most `PERFECT_SCALING_MARGIN` times the perfect steps."""
        found: dict[str, float] = {}
        for entry in self.entries:
            if entry.scaling is not None and entry.batch_size and entry.scaling * PERFECT_SCALING_MARGIN >= 1:
                found[entry.method] = max(found.get(entry.method, 0.0), entry.batch_size)
        return found


def worker_words(workers: int) -> str:
    """`1 worker`, `8 workers`."""
    return f"{workers} worker{'s' * (workers > 1)}"


def gather(plan: Plan, folder: StudyFolder) -> Results:
    """Collect and compare what is done.

    Raises:
        ValueError: no run is.
    """
    study, rows = plan.study, folder.read()
    if not any(cell.fingerprint in rows for cell in plan.cells(rows)):
        raise ValueError(f"{folder.path} holds no run of this study yet; `hf-extrap study run` makes them.")
    unknown: Row = {"metric": "loss", "greater_is_better": False}
    measured = next((row for row in rows.values() if row.get("metric")), unknown)
    entries = [_entry(chain, rows, folder) for chain in plan.chains]
    split = "test" if all(row["test"] for entry in entries for row in entry.finished) else "validation"
    metric, greater = measured["metric"], measured["greater_is_better"]
    results = Results(study, entries, metric, greater, split, None, None, _missing(entries), plan.left(rows), plan.size)
    for entry in entries:
        entry.test = estimate(list(entry.scores(split).values()))
        entry.validation = estimate(list(entry.scores("validation").values()))
        entry.sharpness = estimate(list(entry.sharpness_by_seed().values()))
    if study.target is not None:
        results.target_metric = (study.target.metric or metric).removeprefix("eval_")
        results.target = _target(results, study.target)
    for entry in entries:
        _compare(entry, results)
    for entry in entries:
        if (start := results.scaling_start) and entry.batch_size and (steps := entry.reached_by_all):
            entry.scaling = start[0] * start[1] / (entry.batch_size * steps.mean)
    return results


def _entry(chain: Chain, rows: Rows, folder: StudyFolder) -> Entry:
    done = [(cell.stage, rows[cell.fingerprint]) for cell in chain.cells(rows) if cell.fingerprint in rows]
    tuning, finals = ([row for stage, row in done if stage == wanted] for wanted in ("tune", "final"))
    paces = [row["seconds_per_step"] for row in finals if row.get("seconds_per_step")]
    return Entry(
        chain.method,
        chain.workers,
        trials=[(trial.point, trial.score) for trial in chain.trials(rows) if trial.is_done],
        tuning=tuning,
        finals=finals,
        histories=[folder.history(row["fingerprint"]) for row in finals],
        trials_planned=chain.study.search.trials,
        seeds_planned=len(chain.study.seeds),
        point=best.point if (best := chain.best(rows)) else None,
        batch_size=next((row["batch_size"] for row in [*finals, *tuning] if "batch_size" in row), None),
        seconds_per_step=sum(paces) / len(paces) if paces else None,
    )


def _missing(entries: list[Entry]) -> list[str]:
    found = []
    for entry in entries:
        name = f"{entry.method} × {entry.workers}"
        if len(entry.trials) < entry.trials_planned:
            found.append(f"{name}: {len(entry.trials)} of {entry.trials_planned} trials are done")
        elif entry.point is None:
            found.append(f"{name}: no trial trained")
        elif len(entry.finals) < entry.seeds_planned:
            found.append(f"{name}: {len(entry.finals)} of {entry.seeds_planned} seeds are done")
        if failed := sum(row["status"] == "failed" for row in [*entry.tuning, *entry.finals]):
            found.append(f"{name}: {failed} runs failed")
    return found


def _target(results: Results, target: Target) -> float | None:
    entry = results.of(target.from_)
    if target.from_ is None:
        return target.value
    if entry is None or len(entry.finished) < entry.seeds_planned:
        return None
    values = [row["validation"].get(results.target_metric) for row in entry.finished]
    if None in values:
        raise ValueError(f"target.metric is {target.metric!r}; allowed: {', '.join(entry.finished[0]['validation'])}.")
    mean = sum(values) / len(values)
    return mean + abs(mean) * target.slack * (-1 if results.target_is_greater else 1)


def _compare(entry: Entry, results: Results) -> None:
    """Fill in what an entry is beside the baseline and the reference, and its cost to the target."""
    baseline = results.of(Reference(results.study.baseline, entry.workers)) if results.study.baseline else None
    reference = results.of(results.study.reference)
    if baseline is not None and entry.seconds_per_step and baseline.seconds_per_step:
        entry.relative_seconds = entry.seconds_per_step / baseline.seconds_per_step
    if baseline is not None and baseline is not entry:
        entry.difference = paired_difference(entry.scores(results.split), baseline.scores(results.split))
        entry.sharpness_difference = paired_difference(entry.sharpness_by_seed(), baseline.sharpness_by_seed())
        if entry.test and baseline.test and reference and reference.test:
            means = entry.test.mean, baseline.test.mean, reference.test.mean
            entry.gap_closed = gap_closed(*means, results.greater_is_better)
    if results.target is not None and entry.finals:
        costs = []
        for row, history in zip(entry.finals, entry.histories, strict=True):
            steps = steps_to(results.target, history, results.target_metric or "", results.target_is_greater)
            if row["status"] == "finished" and steps is not None:
                gradients = steps * gradients_per_step(ExtrapConfig.from_dict(row["extrap"]), steps)
                pace = row["seconds_per_step"]
                costs.append((steps, gradients, math.nan if pace is None else steps * pace))
        for index, name in enumerate(("steps", "gradients", "seconds")):
            entry.to_target[name] = estimate([cost[index] for cost in costs])
