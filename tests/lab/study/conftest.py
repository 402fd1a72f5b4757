"""A study whose runs are computed, not trained: validation perplexity is a formula of its settings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_extrap.lab.study import execution
from hf_extrap.recipes.configuration import Configuration
from hf_extrap.recipes.run_folder import RunFolder

STUDY: dict[str, Any] = {
    "name": "computed",
    "config": "recipe.yaml",
    "batches": [{"workers": 1}, {"workers": 4}],
    "methods": {
        "none": {"search": {"learning_rate": [0.1, 1, 10, 100]}},
        "extrap": {"search": {"learning_rate": [1, 10], "extrap_step_ratio": [0.5, 1.0]}},
    },
    "search": {"trials": 4},
    "tune_seeds": [0],
    "seeds": [1, 2, 3],
    "target": {"metric": "perplexity", "value": 63.5},
    "reference": {"method": "none", "workers": 1},
    "baseline": "none",
}

RECIPE = {"task": "language_modeling", "eval_strategy": "steps", "eval_steps": 10, "max_steps": 40, "learning_rate": 1}


def perplexity(rate: float, workers: int, extrap: str, seed: int) -> float:
    """50 + 5 a doubling of the workers, less 4 with `extrap`, least at rate 1, and 1 more for each seed."""
    base = 50 + 5 * math.log2(workers) - (4 if extrap == "extrap" else 0)
    return base + 10 * math.log10(rate) ** 2 + seed


class ComputedRuns:
    """Stands for `hf_extrap.recipes.run.run`.

    Attributes:
        given: the resolved fields of each run, in order.
        errors: what the run of this number, counted from 0, raises.
    """

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []
        self.errors: dict[int, BaseException] = {}

    def __call__(
        self, configuration: Configuration, command: str, callbacks: Sequence[Any] = (), print_logs: bool = True
    ) -> dict[str, Any]:
        arguments = configuration.training_arguments
        folder = RunFolder(Path(str(arguments.output_dir)))
        folder.check(configuration.given, resume=False)
        folder.write_configuration({"arguments": configuration.given})
        number = len(self.given)
        self.given.append(configuration.given)
        if number in self.errors:
            raise self.errors.pop(number)
        rate, workers = arguments.learning_rate, arguments.extrap_virtual_workers
        final = perplexity(rate, workers, arguments.extrap, arguments.seed)
        diverged = rate >= 100
        history: list[dict[str, Any]] = [{"step": 1, "loss": 5.3}]
        if not diverged:
            history += [{"step": step, "eval_perplexity": final + 40 - step} for step in (10, 20, 30, 40)]
        values = {} if diverged else {"eval_perplexity": final, "eval_loss": math.log(final), "eval_runtime": 1.0}
        metrics = {
            "status": "diverged" if diverged else "finished",
            "diverged_at": 7 if diverged else None,
            **{"task": "language_modeling", "metric": "perplexity", "greater_is_better": False},
            "extrap": arguments.extrap_config().to_dict(),
            **{"optimizer": "SGD", "device": "cpu"},
            **{"learning_rate": rate, "peak_learning_rate": rate},
            "train_loss": 4.0,
            "steps": 7 if diverged else 40,
            "epochs": 1.0,
            "global_batch_units": 8.0 * workers,
            "seconds_per_step": 0.25 if arguments.extrap == "extrap" else 0.125,
            "eval": values,
            "test": None if diverged else {"test_perplexity": final + 2, "test_loss": math.log(final + 2)},
        }
        folder.write_history(history)
        folder.write_metrics(metrics)
        return metrics


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> ComputedRuns:
    """Runs of studies in this process are computed."""
    runs = ComputedRuns()
    monkeypatch.setattr(execution, "run", runs)
    # It takes a third of a second, and there is nothing to collect.
    monkeypatch.setattr(execution.gc, "collect", lambda: 0)
    return runs


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """Writes the study, changed: `write_study({"search.trials": 3})`; None takes a key away."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def write(changes: dict[str, Any] | None = None) -> Path:
        content = copy.deepcopy(STUDY)
        for path, value in (changes or {}).items():
            *parents, last = path.split("/")
            at = content
            for parent in parents:
                at = at.setdefault(parent, {})
            if value is None:
                del at[last]
            else:
                at[last] = value
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return file

    return write
