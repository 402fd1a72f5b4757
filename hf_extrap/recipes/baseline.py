"""The run without extrapolation beside a run, for the comparison in its model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_extrap.recipes.run_folder import METRICS_FILE, RunFolder, different_fields, plain

#: What two runs must share, beside the arguments that say nothing about it.
EQUAL = ("task", "metric", "steps", "seed", "global_batch", "facts")


@dataclass(frozen=True)
class Baseline:
    """A finished run with the preset `none`.

    `differences` are the fields in which it differs from the other run, but for those of the extrapolation.
    """

    name: str
    metrics: dict[str, Any]
    differences: list[str]


def find_baseline(folder: Path, metrics: Mapping[str, Any]) -> Baseline | None:
    """The baseline of a run: a finished run with the preset `none` in a folder beside the run's own.

    It has the same task, metric, steps, seed, global batch and facts of data and model. Of several it is the one with
    the fewest other differences, such as a learning rate of its own, and of these the first by name. Folders without
    readable files of a run are passed over.
    """
    metrics = plain(metrics)
    if metrics["preset"] == "none":
        return None
    found = []
    for path in sorted(folder.absolute().parent.glob(f"*/{METRICS_FILE}")):
        if path.parent == folder.absolute():
            continue
        try:
            other = RunFolder(path.parent).read_metrics()
        except (OSError, ValueError):
            continue
        same = all(other.get(name) == metrics.get(name) for name in EQUAL)
        if not same or other.get("preset") != "none" or other.get("status") != "finished":
            continue
        given = other.get("arguments")
        fields = different_fields(metrics["arguments"], given) if isinstance(given, dict) else []
        found.append(Baseline(path.parent.name, other, [name for name in fields if not name.startswith("extrap")]))
    return min(found, key=lambda baseline: len(baseline.differences), default=None)
