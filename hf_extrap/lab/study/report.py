"""The report of a study: tables on the screen and in report.md, figures, and all numbers in summary.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_extrap.lab.study.figures import draw
from hf_extrap.lab.study.plan import Plan
from hf_extrap.lab.study.results import (
    PERFECT_SCALING_MARGIN,
    Entry,
    Results,
    gather,
    largest_scaling_batch,
    worker_words,
)
from hf_extrap.lab.study.runner import study_folder
from hf_extrap.lab.study.specification import read_study
from hf_extrap.lab.study.statistics import Estimate
from hf_extrap.lab.summary import plus_minus
from hf_extrap.recipes.figures import spoken
from hf_extrap.recipes.run_folder import plain, versions, write_json, write_text
from hf_extrap.recipes.tables import make_table

REPORT_FILE, SUMMARY_FILE = "report.md", "summary.json"


def report_study(
    path: str | Path,
    output_dir: str | Path | None = None,
    command: str = "hf-extrap study report",
    console: Console | None = None,
) -> Results:
    """Print the report of what is done of a study, and write report.md, summary.json and the figures.

    Args:
        path: the study's file.
        output_dir: the study's folder; default runs/study-<name>.
        command: what the user typed, for the record.
        console: where to print; default: standard output.

    Raises:
        ValueError: no run of the study is done, or its file is not allowed.
        FileNotFoundError: the study or its recipe is missing.
    """
    plan = Plan(read_study(path))
    folder = study_folder(plan.study, output_dir)
    results = gather(plan, folder)
    figures = draw(plan, results, folder.path)
    write_json(folder.path / SUMMARY_FILE, summary(plan, results))
    write_text(folder.path / REPORT_FILE, markdown(plan, results, figures, command))
    console = console or Console()
    # Narrower than this the columns of numbers are folded beyond reading.
    console.width = max(console.width, 120)
    for title, tables in _sections(plan, results):
        console.print(f"\n{title}", style="bold", highlight=False)
        for columns, rows in tables:
            console.print(make_table(None, columns, rows))
    for sentence in _sentences(plan, results):
        console.print(sentence, style="dim", soft_wrap=True, highlight=False)
    for name in (REPORT_FILE, SUMMARY_FILE, *(name for name, _ in figures)):
        console.print(str(folder.path / name), soft_wrap=True, highlight=False)
    return results


Table = tuple[list[str], list[list[str]]]


def _sections(plan: Plan, results: Results) -> list[tuple[str, list[Table]]]:
    """A heading and tables for each batch size: how good, at what price, and, where it was measured, how sharp."""
    found = []
    for batch in plan.study.batches:
        entries = [entry for entry in results.entries if entry.workers == batch.workers]
        size = next((entry.batch_size for entry in entries if entry.batch_size is not None), None)
        title = worker_words(batch.workers) + (f", batch size {size:,.0f}" if size else "")
        tables = [_quality(plan, results, entries), _price(plan, results, entries)]
        if any(entry.sharpness for entry in entries):
            tables.append(_sharpness(plan, entries))
        found.append((title, tables))
    return found


def _quality(plan: Plan, results: Results, entries: list[Entry]) -> Table:
    baseline = plan.study.baseline
    columns = ["method", "best settings", f"{results.split} {spoken(results.metric)}", "95 % interval"]
    columns += [f"minus {baseline}", "95 % interval", "gap closed"] if baseline else []
    # A loss differs in digits that a perplexity or an accuracy does not have.
    digits = ".3f" if results.metric == "loss" else ".2f"
    signed = f"+{digits}"
    rows = []
    for entry in entries:
        row = [entry.method, _settings(entry), _score(entry, digits), _interval(entry.test, digits)]
        if baseline:
            row += [_plus_minus(entry.difference, signed), _interval(entry.difference, signed)]
            row.append(_closed(entry.gap_closed))
        rows.append(row)
    return columns, rows


def _price(plan: Plan, results: Results, entries: list[Entry]) -> Table:
    columns = ["method"] + (["steps to target", "gradients", "seconds", "of perfect"] if results.target else [])
    columns += ["seconds a step", *(["relative"] if plan.study.baseline else [])]
    columns += ["trials", "diverged", "largest rate"]
    rows = []
    for entry in entries:
        row = [entry.method]
        if results.target:
            row += [_to_target(entry, name) for name in ("steps", "gradients", "seconds")]
            row.append("–" if entry.scaling is None else f"{100 * entry.scaling:.0f} %")
        row.append(_number(entry.seconds_per_step, ".3f"))
        if plan.study.baseline:
            row.append(_number(entry.relative_seconds, ".2f"))
        row += [f"{len(entry.trials)}/{entry.trials_planned}", str(entry.diverged_trials)]
        rows.append([*row, _number(entry.largest_learning_rate, ".3g")])
    return columns, rows


def _sharpness(plan: Plan, entries: list[Entry]) -> Table:
    baseline = plan.study.baseline
    columns = ["method", "sharpness at the end", "95 % interval"]
    columns += [f"minus {baseline}", "95 % interval"] if baseline else []
    rows = []
    for entry in entries:
        row = [entry.method, _plus_minus(entry.sharpness, ".2f"), _interval(entry.sharpness, ".2f")]
        if baseline:
            difference = entry.sharpness_difference
            row += [_plus_minus(difference, "+.2f"), _interval(difference, "+.2f")]
        rows.append(row)
    return columns, rows


def _closed(share: float | None) -> str:
    """A gap closed in per cent; a method that is ten gaps worse or more is told as that."""
    if share is None:
        return "–"
    return "under −1,000 %" if share < -10 else f"{100 * share:.0f} %"


def _settings(entry: Entry) -> str:
    if entry.point is None:
        return "–"
    return ", ".join(
        f"{name.removeprefix('extrap_')} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in entry.point.items()
    )


def _score(entry: Entry, digits: str) -> str:
    lost = len(entry.finals) - len(entry.finished)
    if entry.test is None:
        return "diverged" if lost else "–"
    word = _plus_minus(entry.test, digits)
    counts = f"{len(entry.finished)}/{entry.seeds_planned} seeds" + (f", {lost} diverged or failed" if lost else "")
    return word if len(entry.finished) == entry.seeds_planned else f"{word} ({counts})"


def _to_target(entry: Entry, name: str) -> str:
    found = entry.to_target.get(name)
    if found is None:
        return "not reached" if name == "steps" and entry.finals else "–"
    word = _plus_minus(found, ",.0f")
    partly = name == "steps" and found.count < entry.seeds_planned
    return word + (f" ({found.count}/{entry.seeds_planned} seeds)" if partly else "")


def _plus_minus(found: Estimate | None, form: str) -> str:
    return "–" if found is None else plus_minus(found.mean, found.std, form)


def _interval(found: Estimate | None, form: str) -> str:
    return "–" if found is None or found.low is None else f"{found.low:{form}} … {found.high:{form}}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _sentences(plan: Plan, results: Results) -> list[str]:
    """What the numbers are, and what is missing."""
    study = plan.study
    better = "higher" if results.greater_is_better else "lower"
    found = [
        f"{results.split.capitalize()} {spoken(results.metric)} ({better} is better), mean ± standard deviation over "
        f"seeds {', '.join(map(str, study.seeds))}, each method at the best of {study.search.trials} trials by "
        f"validation ({study.search.kind}, seeds {', '.join(map(str, study.tune_seeds))}); intervals are "
        "percentile bootstraps over seeds."
    ]
    if study.reference and study.baseline:
        found.append(
            f"Gap closed: ({study.baseline} − method) / ({study.baseline} − {study.reference.method} with "
            f"{worker_words(study.reference.workers)}), all tuned; none where there is no gap."
        )
    if results.target is not None:
        within = ", ".join(f"{method} {batch:,.0f}" for method, batch in largest_scaling_batch(results).items())
        found.append(
            f"Target: validation {spoken(results.target_metric or '')} {results.target:.4g}, read from evaluations "
            f"during training; seconds are of training steps alone. Largest batch within "
            f"{100 * (PERFECT_SCALING_MARGIN - 1):.0f} % of perfect scaling: {within or 'none'}."
        )
    elif study.target is not None:
        found.append("The target is not known yet: it comes from runs that are not done.")
    found.append("Largest rate: the largest peak learning rate among the trials that still trained.")
    if any(entry.sharpness for entry in results.entries):
        found.append(
            "Sharpness: the largest eigenvalue of the Hessian of the training loss at x, on the last training "
            "batches, as the last evaluation during training logged it; its differences are paired by seed too."
        )
    if results.missing:
        found.append(f"Not complete, {results.left} of {results.size} runs are left: {'; '.join(results.missing)}.")
    return found


def markdown(plan: Plan, results: Results, figures: list[tuple[str, str]], command: str) -> str:
    """The content of report.md."""
    lines = [f"# {plan.study.name.replace('_', ' ').capitalize()}", ""]
    lines += [text for sentence in _sentences(plan, results) for text in (sentence, "")]
    for title, tables in _sections(plan, results):
        lines += [f"## {title[:1].upper()}{title[1:]}", ""]
        for columns, rows in tables:
            lines += [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
            lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    for name, caption in figures:
        lines += [f"![{caption}]({name})", "", caption, ""]
    used = ", ".join(f"{name} {version}" for name, version in _versions(results).items())
    return "\n".join([*lines, f"Command: `{command}`. Versions of the runs: {used}.", ""])


def _versions(results: Results) -> dict[str, str]:
    """Each library's version in the rows, all of them where they differ."""
    rows = [row for entry in results.entries for row in [*entry.tuning, *entry.finals] if row.get("versions")]
    names = list(rows[0]["versions"]) if rows else []
    return {name: " / ".join(sorted({row["versions"].get(name, "?") for row in rows})) for name in names}


def summary(plan: Plan, results: Results) -> dict[str, Any]:
    """The content of summary.json."""
    entries = []
    for entry in results.entries:
        fields = {
            f.name: getattr(entry, f.name)
            for f in dataclasses.fields(entry)
            if f.name not in ("tuning", "finals", "histories", "trials")
        }
        entries.append(
            {
                name: {key: _estimate(item) for key, item in value.items()}
                if isinstance(value, dict) and name == "to_target"
                else _estimate(value)
                for name, value in fields.items()
            }
            | {
                "trials": [{"point": point, "score": score} for point, score in entry.trials],
                "seeds_finished": len(entry.finished),
                "seeds_done": len(entry.finals),
                "diverged_trials": entry.diverged_trials,
                "largest_learning_rate": entry.largest_learning_rate,
                "finals": [row["fingerprint"] for row in entry.finals],
            }
        )
    names = ("metric", "greater_is_better", "split", "target_metric", "target", "missing", "left", "size")
    return plain(
        {
            "study": plan.study.name,
            **{name: getattr(results, name) for name in names},
            "largest_batch_within_perfect_scaling": dict(largest_scaling_batch(results)),
            "entries": entries,
            "versions": versions(),
        }
    )


def _estimate(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Estimate) else value
