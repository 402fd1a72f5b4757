from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_extrap import ExtrapConfig
from hf_extrap.optim.config import PRESETS

# direction, scope, scaling, ascent: the table of the algorithm.
TABLE = {
    "none": ("none", None, "none", False),
    "extrap": ("gradient", "local", "layer_step", False),
    "extrap-past": ("past_gradient", "local", "layer_step", False),
    "extragradient": ("gradient", "global", "none", False),
    "optimistic": ("past_gradient", "global", "none", False),
    "past-update": ("past_update", "global", "none", False),
    "msam": ("past_update", "global", "norm", False),
    "gaussian": ("gaussian", "local", "layer", None),
    "smoothout": ("uniform", "local", "filter", None),
    "sam": ("gradient", "local", "norm", True),
    "asam": ("gradient", "local", "adaptive", True),
}


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_as_tabled(name: str) -> None:
    assert set(PRESETS) == set(TABLE)
    config = ExtrapConfig.preset(name)
    found = (config.direction, config.scope, config.scaling, config.ascent)
    for field, expected in zip(found, TABLE[name], strict=True):
        assert expected is None or field == expected
    assert name == "none" or (config.step_size is None) != (config.step_ratio is None)


def test_overrides_replace_fields() -> None:
    config = ExtrapConfig.preset("extrap", scope="global", start_step=3, end_step=9, seed=7, anneal=False)
    assert (config.scope, config.start_step, config.end_step, config.seed, config.anneal) == ("global", 3, 9, 7, False)
    assert config.direction == "gradient"


@pytest.mark.parametrize("name", [name for name in TABLE if name != "none"])
def test_one_step_replaces_the_other(name: str) -> None:
    by_ratio = ExtrapConfig.preset(name, step_ratio=0.25)
    assert (by_ratio.step_ratio, by_ratio.step_size) == (0.25, None)
    by_size = ExtrapConfig.preset(name, step_size=0.75)
    assert (by_size.step_ratio, by_size.step_size) == (None, 0.75)


def test_a_length_in_other_units_replaces_the_scaling_by_the_last_step() -> None:
    assert ExtrapConfig.preset("extrap-past", step_size=0.5).scaling == "layer_step"
    assert ExtrapConfig.preset("extrap-past", step_ratio=0.5).scaling == "none"
    assert ExtrapConfig.preset("extrap", step_size="auto").scaling == "none"
    assert ExtrapConfig.preset("extrap", step_size=0.5, scaling="norm").scaling == "norm"
    assert ExtrapConfig.preset("gaussian", step_ratio=0.5).scaling == "layer"


def test_configs_anneal_by_default_and_are_frozen_and_hashable() -> None:
    config = ExtrapConfig.preset("extrap", step_size=0.1)
    assert ExtrapConfig().anneal and config.anneal
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.scope = "global"  # type: ignore[misc]
    assert hash(config) == hash(ExtrapConfig.preset("extrap", step_size=0.1))
    assert config != ExtrapConfig.preset("extrap", step_size=0.1, seed=1)


WRONG = [
    ({"direction": "sideways"}, ["direction", "sideways", "past_gradient", "past_update", "gaussian", "uniform"]),
    ({"scope": "everywhere"}, ["scope", "everywhere", "local", "global"]),
    ({"scaling": "log"}, ["scaling", "log", "norm", "layer", "filter", "adaptive"]),
    ({"scaling": "step", "step_ratio": 0.5}, ["scaling", "step", "step_ratio", "0.5", "share of the last step"]),
    ({"direction": "gaussian", "precondition": True}, ["precondition", "gaussian", "past_gradient"]),
    ({"direction": "past_update", "precondition": True}, ["precondition", "past_update", "past_gradient"]),
    ({"precondition": 1}, ["precondition", "1"]),
    ({"batch": "next"}, ["batch", "next", "same", "independent"]),
    ({"direction_dtype": "int8"}, ["direction_dtype", "int8", "bfloat16"]),
    ({"step_size": -1.0}, ["step_size", "-1.0", "auto"]),
    ({"step_size": "large"}, ["step_size", "large", "auto"]),
    ({"step_size": float("nan")}, ["step_size", "nan"]),
    ({"step_size": True}, ["step_size", "True"]),
    ({"step_ratio": -0.5}, ["step_ratio", "-0.5"]),
    ({"step_ratio": float("inf")}, ["step_ratio", "inf"]),
    ({"step_ratio": "auto"}, ["step_ratio", "auto", "number"]),
    ({"step_size": 0.1, "step_ratio": 0.1}, ["step_size", "step_ratio", "both", "exactly one"]),
    ({"step_size": "auto", "curvature_share": 0.0}, ["curvature_share", "0.0"]),
    ({"batch_fraction": 0.0}, ["batch_fraction", "0.0", "(0, 1]"]),
    ({"batch_fraction": 1.5}, ["batch_fraction", "1.5", "(0, 1]"]),
    ({"batch_fraction": "half"}, ["batch_fraction", "half", "(0, 1]"]),
    ({"ascent": "yes"}, ["ascent", "yes"]),
    ({"anneal": 1}, ["anneal", "1"]),
    ({"probe_every": 0}, ["probe_every", "0"]),
    ({"probe_every": 2.5}, ["probe_every", "2.5"]),
    ({"max_displacement": 0.0}, ["max_displacement", "0.0"]),
    ({"max_displacement": -1}, ["max_displacement", "-1"]),
    ({"start_step": -1}, ["start_step", "-1"]),
    ({"start_step": 5, "end_step": 5}, ["end_step", "5", "start_step"]),
    ({"end_step": 0}, ["end_step", "0"]),
    ({"seed": "lucky"}, ["seed", "lucky"]),
    ({"stepsize": 0.1}, ["stepsize", "step_size", "step_ratio"]),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_wrong_field_is_refused_in_a_sentence(fields: dict[str, object], words: list[str]) -> None:
    """Named: the field, its value and what is allowed."""
    with pytest.raises(ValueError) as error:
        ExtrapConfig.preset("extrap", **fields)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith(".")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="super-extrap") as error:
        ExtrapConfig.preset("super-extrap")
    assert all(name in str(error.value) for name in TABLE)


def test_a_direction_needs_a_step_and_noise_has_no_curvature() -> None:
    with pytest.raises(ValueError, match="step_size and step_ratio"):
        ExtrapConfig(direction="gradient")
    for preset in ("gaussian", "smoothout"):
        with pytest.raises(ValueError, match="auto"):
            ExtrapConfig.preset(preset, step_size="auto")


EXAMPLES = [
    *(ExtrapConfig.preset(name) for name in TABLE),
    ExtrapConfig.preset("extrap-past", step_size="auto", probe_every=3, max_displacement=0.5, curvature_share=0.15),
    ExtrapConfig.preset("extrap", step_size=5e-5, batch="independent", batch_fraction=0.5, direction_dtype="bfloat16"),
    ExtrapConfig.preset("sam", step_ratio=1e-7, start_step=10, end_step=20, seed=123, anneal=True, ascent=False),
]


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: config.direction)
def test_round_trips(config: ExtrapConfig, tmp_path: Path) -> None:
    assert ExtrapConfig.from_dict(config.to_dict()) == config
    assert ExtrapConfig.from_json(config.to_json()) == config
    assert ExtrapConfig.from_yaml(config.to_yaml()) == config
    assert set(json.loads(config.to_json())) == {field.name for field in dataclasses.fields(ExtrapConfig)}
    assert yaml.safe_load(config.to_yaml()) == config.to_dict() == json.loads(config.to_json())
    for name in ("config.json", "config.yaml"):
        config.save(tmp_path / name)
        assert ExtrapConfig.load(tmp_path / name) == config


def test_fields_left_out_keep_their_defaults() -> None:
    config = ExtrapConfig.from_yaml("direction: gradient\nstep_ratio: 0.5\n")
    assert config == ExtrapConfig(direction="gradient", step_ratio=0.5)


@pytest.mark.parametrize("text", ["[1, 2]", '"extrap"', "{", '{"direction": "none", "momentum": 0.9}'])
def test_other_json_and_unknown_fields_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="momentum" if "momentum" in text else None):
        ExtrapConfig.from_json(text)


@pytest.mark.parametrize(
    ("fields", "active"),
    [({}, [0, 1, 2, 3, 4, 5]), ({"start_step": 2}, [2, 3, 4, 5]), ({"start_step": 1, "end_step": 4}, [1, 2, 3])],
)
def test_active_from_start_to_before_end(fields: dict[str, int], active: list[int]) -> None:
    config = ExtrapConfig.preset("extrap", **fields)
    assert [t for t in range(6) if config.is_active(t)] == active


def test_it_imports_no_torch() -> None:
    code = "import sys, hf_extrap.optim.config, hf_extrap; hf_extrap.ExtrapConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
