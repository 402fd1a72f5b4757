"""The report of a study: tables on the screen and in report.md, figures, and all numbers in summary.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_extrap.lab.study.figures import draw
from hf_extrap.lab.study.folder import study_folder
from hf_extrap.lab.study.plan import Plan
from hf_extrap.lab.study.results import PERFECT_SCALING_MARGIN, Entry, Results, gather, worker_words
from hf_extrap.lab.study.specification import Study, read_study
from hf_extrap.lab.study.statistics import Estimate
from hf_extrap.recipes.run_folder import plain, write_json, write_text
from hf_extrap.recipes.tables import make_table
from hf_extrap.training.figures import spoken
from hf_extrap.training.markdown import code, escaped, escaped_text
from hf_extrap.training.versions import versions

REPORT_FILE, SUMMARY_FILE = "report.md", "summary.json"

Cells = list[tuple[str, str]]
"""A row of a table: titles of the columns and texts."""

Table = tuple[list[str], list[list[str]]]
"""Titles of the columns, and the rows of texts."""


def report_study(
    study: str | Path | Study,
    output_dir: str | Path | None = None,
    command: str = "hf-extrap study report",
    console: Console | None = None,
) -> Results:
    """Print the report of what is done of a study, and write report.md, summary.json and the figures.

    Args:
        study: the study, or its file.
        output_dir: the study's folder; default runs/study-<name>.
        command: the command line, for the record.
        console: where to print; default: standard output.

    Raises:
        ValueError: no run of the study is done, or its file is not allowed.
        FileNotFoundError: the study or its recipe is missing.
    """
    plan = Plan(study if isinstance(study, Study) else read_study(study))
    folder = study_folder(plan.study, output_dir)
    results = gather(plan, folder)
    figures = draw(results, folder.path)
    write_json(folder.path / SUMMARY_FILE, summary(results))
    write_text(folder.path / REPORT_FILE, markdown(results, figures, command))
    console = console or Console()
    # Narrower than this the columns of numbers are folded beyond reading.
    console.width = max(console.width, 120)
    for title, tables in _sections(results):
        console.print(f"\n{title}", style="bold", highlight=False, markup=False)
        for table in tables:
            console.print(make_table(None, *table))
    for sentence in _sentences(results):
        console.print(sentence, style="dim", soft_wrap=True, highlight=False, markup=False)
    for name in (REPORT_FILE, SUMMARY_FILE, *figures):
        console.print(str(folder.path / name), soft_wrap=True, highlight=False, markup=False)
    return results


def _sections(results: Results) -> list[tuple[str, list[Table]]]:
    """A heading and tables for each batch size: quality, cost and, where it was measured, sharpness."""
    found = []
    for batch in results.study.batches:
        entries = [entry for entry in results.entries if entry.workers == batch.workers]
        size = next((entry.batch_size for entry in entries if entry.batch_size is not None), None)
        kinds = [_quality, _cost, *([_sharpness] if any(entry.sharpness for entry in entries) else [])]
        if entries:
            rows = [[kind(results, entry) for entry in entries] for kind in kinds]
            tables = [
                ([title for title, _ in table[0]], [[text for _, text in row] for row in table]) for table in rows
            ]
            found.append((worker_words(batch.workers) + (f", batch size {size:,.0f}" if size else ""), tables))
    return found


def _quality(results: Results, entry: Entry) -> Cells:
    # A loss differs in digits that a perplexity or an accuracy does not have.
    digits = ".3f" if results.metric == "loss" else ".2f"
    settings = [
        f"{name.removeprefix('extrap_')} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in (entry.point or {}).items()
    ]
    lost, done, planned = len(entry.finals) - len(entry.finished), len(entry.finished), entry.seeds_planned
    (title, score), interval = _estimate(f"{results.split} {spoken(results.metric)}", entry.test, digits)
    if entry.test is None:
        score = "diverged" if lost else "–"
    elif done < planned:
        score += f" ({done}/{planned} seeds{f', {lost} diverged or failed' if lost else ''})"
    row = [("method", entry.method), ("best settings", ", ".join(settings) or "–"), (title, score), interval]
    if baseline := results.study.baseline:
        # A method that is ten gaps worse or more is shown as that.
        share = entry.gap_closed
        gap = "under −1,000 %" if share is not None and share < -10 else _number(share, ".0%")
        row += [*_estimate(f"minus {baseline}", entry.difference, f"+{digits}"), ("gap closed", gap)]
    return row


def _cost(results: Results, entry: Entry) -> Cells:
    row = [("method", entry.method)]
    if results.target:
        steps = entry.to_target.get("steps")
        found = {name: _plus_minus(entry.to_target.get(name), ",.0f") for name in ("steps", "gradients", "seconds")}
        if steps is None and entry.finals:
            found["steps"] = "not reached"
        elif steps is not None and entry.reached_by_all is None:
            found["steps"] += f" ({steps.count}/{entry.seeds_planned} seeds)"
        row += [("steps to target", found["steps"]), ("gradients", found["gradients"]), ("seconds", found["seconds"])]
        row.append(("of perfect", _number(entry.scaling, ".0%")))
    row.append(("seconds a step", _number(entry.seconds_per_step, ".3f")))
    if results.study.baseline:
        row.append(("relative", _number(entry.relative_seconds, ".2f")))
    row += [("trials", f"{len(entry.trials)}/{entry.trials_planned}"), ("diverged", str(entry.diverged_trials))]
    return [*row, ("largest rate", _number(entry.largest_learning_rate, ".3g"))]


def _sharpness(results: Results, entry: Entry) -> Cells:
    row = [("method", entry.method), *_estimate("sharpness at the end", entry.sharpness, ".2f")]
    if baseline := results.study.baseline:
        row += _estimate(f"minus {baseline}", entry.sharpness_difference, "+.2f")
    return row


def _estimate(title: str, found: Estimate | None, form: str) -> Cells:
    interval = "–" if found is None or found.low is None else f"{found.low:{form}} … {found.high:{form}}"
    return [(title, _plus_minus(found, form)), ("95 % interval", interval)]


def _plus_minus(found: Estimate | None, form: str) -> str:
    """`mean ± standard deviation`; a sign that `form` asks for is the mean's alone."""
    if found is None:
        return "–"
    return format(found.mean, form) + ("" if found.std is None else f" ± {found.std:{form.removeprefix('+')}}")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("%", " %")


def _sentences(results: Results) -> list[str]:
    """What the numbers are, and what is missing."""
    study = results.study
    better = "higher" if results.greater_is_better else "lower"
    tuned = (
        f", each method at the best of {study.search.trials} trials by validation ({study.search.kind}, seeds "
        f"{', '.join(map(str, study.tune_seeds))})"
    )
    found = [
        f"{results.split.capitalize()} {spoken(results.metric)} ({better} is better), mean ± standard deviation over "
        f"seeds {', '.join(map(str, study.seeds))}{tuned if study.tune_seeds else ''}; intervals are percentile "
        "bootstraps over seeds."
    ]
    if study.reference and study.baseline:
        found.append(
            f"Gap closed: ({study.baseline} − method) / ({study.baseline} − {study.reference.method} with "
            f"{worker_words(study.reference.workers)}), all tuned; none where there is no gap."
        )
    if results.target is not None:
        within = ", ".join(f"{method} {batch:,.0f}" for method, batch in results.largest_scaling_batch.items())
        found.append(
            f"Target: validation {spoken(results.target_metric or '')} {results.target:.4g}, read from evaluations "
            "during training; seconds are of training steps alone. Largest batch within "
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


def markdown(results: Results, figures: dict[str, str], command: str) -> str:
    """The content of report.md; `figures` holds the caption of each file."""
    lines = [f"# {escaped(results.study.name.replace('_', ' ').capitalize())}", ""]
    lines += [text for sentence in _sentences(results) for text in (escaped_text(sentence), "")]
    for title, tables in _sections(results):
        lines += [f"## {title[:1].upper()}{title[1:]}", ""]
        for columns, rows in tables:
            lines += [f"| {' | '.join(map(escaped, columns))} |", "|---|" + "---:|" * (len(columns) - 1)]
            lines += [f"| {' | '.join(map(escaped, row))} |" for row in rows] + [""]
    for name, caption in figures.items():
        lines += [f"![{escaped_text(caption)}]({name})", "", escaped_text(caption), ""]
    # Each library's version in the rows, all of them where they differ.
    found = [row["versions"] for e in results.entries for row in [*e.tuning, *e.finals] if row.get("versions")]
    names = list(found[0]) if found else []
    used = [f"{name} {' / '.join(sorted({of_run.get(name, '?') for of_run in found}))}" for name in names]
    versions_used = escaped_text(", ".join(used))
    return "\n".join([*lines, f"Command: {code(command)}. Versions of the runs: {versions_used}.", ""])


def summary(results: Results) -> dict[str, Any]:
    """The content of summary.json."""
    names = ("metric", "greater_is_better", "split", "target_metric", "target", "missing", "left", "size")
    left_out = ("tuning", "finals", "histories", "trials")
    entries = [
        {name: value for name, value in dataclasses.asdict(entry).items() if name not in left_out}
        | {
            "trials": [{"point": point, "score": score} for point, score in entry.trials],
            "seeds_finished": len(entry.finished),
            "seeds_done": len(entry.finals),
            "diverged_trials": entry.diverged_trials,
            "largest_learning_rate": entry.largest_learning_rate,
            "finals": [row["fingerprint"] for row in entry.finals],
        }
        for entry in results.entries
    ]
    return plain(
        {
            "study": results.study.name,
            **{name: getattr(results, name) for name in names},
            "largest_batch_within_perfect_scaling": results.largest_scaling_batch,
            "entries": entries,
            "versions": versions(),
        }
    )
