"""The file of a study: errors in one sentence before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_extrap.cli import main
from hf_extrap.lab.study.plan import Plan
from hf_extrap.lab.study.specification import Range, read_study

WriteStudy = Callable[..., Path]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batchs": []}, "batchs is unknown (did you mean 'batches'?)"),
        ({"name": None}, "name is missing"),
        ({"name": 3}, "name is 3; allowed: a valid string"),
        ({"batches": []}, "batches is empty; allowed: at least one"),
        ({"batches": [{"workers": 1}, {"workers": 1}]}, "batches holds one twice"),
        ({"batches": [{"workers": 0}]}, "batches[0].workers is 0; allowed: greater than or equal to 1"),
        ({"search/trials": 5}, "methods.none.search has 4 points and search.trials is 5; allowed: the same number"),
        ({"search/kind": "random"}, "search.kind is 'random'; allowed: 'grid' or 'optuna'"),
        (
            {"methods/none/search/learning_rate": {"low": 1, "high": 2}},
            "a range; allowed with search.kind grid: a list",
        ),
        ({"methods/none/search/learning_rate": {"low": 2, "high": 1}}, "allowed: low < high"),
        ({"methods/none/search/learning_rate": [1, 1, 2, 3]}, "allowed: a list of different values"),
        ({"methods/lamb": {"search": {"learning_rate": [1, 2, 3, 4]}}}, "methods.lamb names no preset"),
        ({"methods/none/fields": {"seed": 1}}, "methods.none.fields gives seed, which a study sets for each run"),
        ({"fields": {"extrap": "sam"}}, "fields gives extrap; allowed: a method's fields"),
        ({"methods/none/search/learning_rate": {"low": 1, "hihg": 2}}, "hihg is unknown (did you mean 'high'?)"),
        ({"tune_seeds": []}, "tune_seeds is empty and search.trials is 4; allowed: at least one"),
        ({"seeds": [0, 1]}, "seeds and tune_seeds both hold 0"),
        ({"baseline": "sgd"}, "baseline is 'sgd'; allowed: a method of the study, none, extrap"),
        ({"reference/workers": 2}, "reference: 'none' does not run with 2 workers; allowed: 1, 4"),
        ({"methods/extrap/workers": [2]}, "methods.extrap.workers is [2]; allowed: different ones of 1, 4"),
        ({"methods/extrap/workers": [4, 4]}, "methods.extrap.workers is [4, 4]; allowed: different ones of 1, 4"),
        ({"methods/extrap/workers": [4.0]}, "methods.extrap.workers[0] is 4.0; allowed: a valid integer"),
        ({"methods/none/workers": [4]}, "reference: 'none' does not run with 1 workers; allowed: 4"),
        (
            {"methods/extrap/workers": [1], "target": {"metric": "loss", "from": {"method": "extrap", "workers": 4}}},
            "target.from: 'extrap' does not run with 4 workers; allowed: 1",
        ),
        ({"target/from": {"method": "none", "workers": 1}}, "target: value and from are both given, or neither"),
        ({"target/slack": 0.1}, "target: slack is 0.1; allowed: a share in [0, 1), beside from"),
        ({"config": "elsewhere.yaml"}, "config elsewhere.yaml is neither in this folder nor beside the study"),
        # Found by resolving the runs.
        ({"fields": {"learnin_rate": 1}}, "unknown field --learnin_rate (did you mean 'learning_rate'?)"),
        ({"methods/extrap/fields": {"extrap_scope": "near"}}, "method 'extrap' with 1 workers: --extrap_scope: inv"),
        ({"fields": {"eval_strategy": "no"}}, "target needs evaluations during training, and eval_strategy is 'no'"),
    ],
)
def test_a_bad_study_ends_in_one_sentence(
    changes: dict[str, Any], sentence: str, write_study: WriteStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "run", str(write_study(changes)), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("hf-extrap: error: ") and error.endswith(".") and "\n" not in error
    assert sentence in error
    assert not (tmp_path / "out").exists()


def test_learning_rates_are_scaled_to_the_batch(write_study: WriteStudy) -> None:
    for rule, factor in (("linear", 4), ("sqrt", 2), ("none", 1)):
        study = read_study(write_study({"methods/extrap/scale_learning_rate": rule}))
        assert study.values("extrap", 1)["learning_rate"] == [1, 10]
        assert study.values("extrap", 4)["learning_rate"] == [factor, 10 * factor]
        assert study.values("extrap", 4)["extrap_step_ratio"] == [0.5, 1.0]
    changes: dict[str, Any] = {"methods/none/search/learning_rate": {"low": "1e-3", "high": 1, "log": True}}
    changes |= {"methods/none/scale_learning_rate": "linear", "search/kind": "optuna"}
    study = read_study(write_study(changes))
    assert study.values("none", 4)["learning_rate"] == Range(4e-3, 4.0, log=True)
    # The first batch is the one that the rates are for, whatever its size.
    study = read_study(write_study({**changes, "batches": [{"workers": 4}, {"workers": 1}]}))
    assert study.values("none", 1)["learning_rate"] == Range(2.5e-4, 0.25, log=True)
    study = read_study(write_study({"methods/none/search/learning_rate": ["1e-3", "1e-2", 1, "auto"]}))
    assert study.methods["none"].search["learning_rate"] == [0.001, 0.01, 1, "auto"]


STUDIES = sorted(path.name for path in (Path(__file__).parents[3] / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.matrix] if name.startswith("gpu_") else []) for name in STUDIES]
)
def test_a_shipped_study_resolves(name: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    plan = Plan(read_study(repository / "configs" / "studies" / name))
    plan.check()
    assert len(plan.ready({})) == len(plan.chains) * plan.study.search.trials * len(plan.study.tune_seeds) > 0
