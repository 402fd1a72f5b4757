"""Every shipped recipe resolves."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_extrap.recipes.configuration import resolve

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ("accelerate", "studies"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_resolves_to_its_task_and_preset(path: Path, tmp_path: Path) -> None:
    configuration = resolve(path, ["--output_dir", str(tmp_path)])
    arguments = configuration.training_arguments
    assert configuration.task.name == path.parent.name
    assert arguments.extrap_config().direction == "past_gradient"
    assert arguments.gradient_accumulation_steps == arguments.extrap_virtual_workers > 1
    full_size = path.stem in ("wikitext2_lstm", "multi30k", "cifar10_resnet20")
    assert (arguments.extrap_virtual_workers == 24) == full_size
    for preset in ("none", "extrap"):
        other = resolve(path, ["--extrap", preset, "--output_dir", str(tmp_path)]).training_arguments
        assert other.extrap_config().is_fresh == (preset == "extrap")


def test_every_task_has_a_recipe() -> None:
    assert {path.parent.name for path in RECIPES} == {"image_classification", "language_modeling", "translation"}
