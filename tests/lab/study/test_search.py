"""The points of a study: a grid, and those of Optuna, which an interrupted study asks for again."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_extrap.lab.study.runner import run_study
from hf_extrap.lab.study.search import grid, suggest
from hf_extrap.lab.study.specification import Range

from .conftest import ComputedRuns

WriteStudy = Callable[..., Path]


def test_suggestions_and_the_grid() -> None:
    values = {"rate": Range(1e-3, 1e3, log=True), "kind": ["p", "q"]}
    first = suggest(values, [], 0, greater_is_better=False)
    assert first == suggest(values, [], 0, greater_is_better=False) != suggest(values, [], 1, greater_is_better=False)
    # The best of many trials are near 10: most suggestions are within a factor of 10, where random ones are a third.
    earlier: list[tuple[dict[str, Any], float]] = [
        ({"rate": 10.0 ** (step / 7 - 3), "kind": "p"}, abs(step / 7 - 4)) for step in range(41)
    ]
    earlier.append(({"rate": 1000.0, "kind": "q"}, math.inf))
    near = [suggest(values, earlier, seed, greater_is_better=False) for seed in range(20)]
    assert sum(0 < math.log10(point["rate"]) < 2 for point in near) >= 12
    assert all(float(f"{point['rate']:.4g}") == point["rate"] for point in near)
    points = grid({"a": [1, 2], "b": ["x", "y"]})
    assert points == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]


def test_an_interrupted_study_of_optuna(computed: ComputedRuns, write_study: WriteStudy, tmp_path: Path) -> None:
    rates = {"low": 0.01, "high": 50, "log": True}
    changes: dict[str, Any] = {"search": {"kind": "optuna", "trials": 6, "seed": 3}}
    changes["methods/none/search/learning_rate"] = rates
    changes["methods/extrap/search"] = {"learning_rate": rates, "extrap_batch": ["same", "independent"]}
    study = write_study(changes)
    folders, quiet = [tmp_path / "whole", tmp_path / "parts"], Console(file=io.StringIO())
    run_study(study, output_dir=folders[0], console=quiet)
    for stop in (3, 11, 20):
        computed.errors[len(computed.given) + stop % 7] = KeyboardInterrupt()
        run_study(study, output_dir=folders[1], console=quiet)
    assert run_study(study, output_dir=folders[1], console=quiet) == 0
    whole, parts = ([json.loads(line) for line in (f / "rows.jsonl").read_text().splitlines()] for f in folders)
    assert len(whole) == 2 * 2 * (6 + 3)
    assert [row["fingerprint"] for row in parts] == [row["fingerprint"] for row in whole]
    tried = [row["learning_rate"] for row in whole if row["stage"] == "tune"]
    assert len(set(tried[:6])) == 6 and all(0.01 <= rate <= 50 for rate in tried)
    # The best of six comes within a factor of four of the optimum, 1.
    finals = {(row["method"], row["workers"]): row["learning_rate"] for row in whole if row["stage"] == "final"}
    assert all(0.25 < rate < 4 for rate in finals.values())
