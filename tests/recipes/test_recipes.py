"""Every shipped recipe and study resolves."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_extrap.lab.study.plan import Plan
from hf_extrap.lab.study.specification import read_study
from hf_extrap.recipes.configuration import resolve

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ("accelerate", "studies"))
STUDIES = sorted(CONFIGS.glob("studies/*.yaml"))


def test_there_are_recipes_of_every_task() -> None:
    assert {path.parent.name for path in RECIPES} == {"image_classification", "language_modeling", "translation"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_resolves_to_its_task_and_preset(path: Path, tmp_path: Path) -> None:
    configuration = resolve(path, ["--output_dir", str(tmp_path)])
    arguments = configuration.training_arguments
    assert configuration.task.name == path.parent.name
    assert arguments.extrap_config().direction == "past_gradient"
    assert arguments.gradient_accumulation_steps == arguments.extrap_virtual_workers > 1
    full_size = path.stem in ("wikitext2_lstm", "multi30k", "cifar10_resnet20")
    assert (arguments.extrap_virtual_workers == 24) == full_size


@pytest.mark.parametrize("preset", ["none", "extrap"])
def test_another_preset_may_take_its_place(preset: str, tmp_path: Path) -> None:
    for path in RECIPES:
        arguments = resolve(path, ["--extrap", preset, "--output_dir", str(tmp_path)]).training_arguments
        assert arguments.extrap_config().is_fresh == (preset == "extrap")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_that_is_shipped_can_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    plan = Plan(read_study(path))
    plan.check()
    assert len(plan.ready({})) == len(plan.chains) * plan.study.search.trials * len(plan.study.tune_seeds)
