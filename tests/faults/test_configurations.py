"""Any fields and any text give a configuration, which is written and read back the same, or one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_extrap import PRESETS, ExtrapConfig
from hf_extrap.training.arguments import ExtrapArguments
from tests.support.random_schemes import NUMBERS, RIGHT, SOME_FIELDS, some_of
from tests.support.refusals import refused_or_done
from tests.support.soak import cases

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**300, 10**320),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["auto", "none", "null", "nan", "1e3", "0x10", "local", b"auto", math.nan, math.inf, -0.0, 1e-320]),
)
"""Values of wrong types, and of right ones by chance."""

ANY_FIELDS = st.tuples(
    SOME_FIELDS, st.dictionaries(st.sampled_from([*RIGHT, "stepsize", ""]), ANYTHING, max_size=2)
).map(lambda both: both[0] | both[1])


def assert_read_back(config: ExtrapConfig) -> None:
    assert ExtrapConfig.from_json(config.to_json()) == config


def test_every_field_has_values_here() -> None:
    assert set(RIGHT) == {field.name for field in dataclasses.fields(ExtrapConfig)}


@cases(400, 10_000)
@given(SOME_FIELDS | ANY_FIELDS)
def test_fields(fields: dict[str, Any]) -> None:
    with refused_or_done():
        config = ExtrapConfig.from_dict(fields)
        assert_read_back(config)
        assert ExtrapConfig.from_yaml(config.to_yaml()) == config


@cases(500, 12_000)
@given(st.sampled_from([*PRESETS, "sgd", ""]) | ANYTHING, SOME_FIELDS | ANY_FIELDS)
def test_presets_with_fields_replaced(name: Any, fields: dict[str, Any]) -> None:
    fields.pop("", None)
    with refused_or_done():
        assert_read_back(ExtrapConfig.preset(name, **fields))


MAPPINGS = ANY_FIELDS | st.dictionaries(ANYTHING.filter(lambda key: key.__hash__ is not None), ANYTHING, max_size=2)


def _broken(text: str, place: float, inserted: str, removed: int) -> str:
    at = int(place * len(text))
    return text[:at] + inserted + text[at + removed :]


BREAKS = st.tuples(
    st.floats(0, 1),
    st.sampled_from(
        ["", ":", "\n", "\t", "{", "[", "*a", "&a ", "!!python/object ", "- ", "\0", '"', "\ud800", "9" * 5000]
    )
    | st.text(max_size=3),
    st.integers(0, 5),
)
"""Where a text is broken, by what, and how many characters are lost."""


@cases(250, 6_000)
@given(SOME_FIELDS, BREAKS)
def test_broken_yaml(fields: dict[str, Any], change: tuple[float, str, int]) -> None:
    with refused_or_done():
        assert_read_back(ExtrapConfig.from_yaml(_broken(yaml.safe_dump(fields), *change)))


@cases(500, 10_000)
@given(SOME_FIELDS, BREAKS)
def test_broken_json(fields: dict[str, Any], change: tuple[float, str, int]) -> None:
    with refused_or_done():
        assert_read_back(ExtrapConfig.from_json(_broken(json.dumps(fields), *change)))


@cases(250, 4_000)
@given(st.text(max_size=40) | ANYTHING | MAPPINGS.map(repr) | st.sampled_from(["[" * 600, "{a: " * 300]), st.booleans())
def test_any_text(text: Any, as_json: bool) -> None:
    with refused_or_done():
        assert_read_back((ExtrapConfig.from_json if as_json else ExtrapConfig.from_yaml)(text))


@dataclass
class FewArguments:
    """The fields of `TrainingArguments` that those of the extrapolation depend on; they take 1 ms, not 100."""

    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    num_train_epochs: float = 3.0
    learning_rate: float = 0.1
    optim: str = "adamw_torch"
    optim_args: str | None = None
    seed: int = 1
    default_optim = "adamw_torch"
    adam_beta1 = 0.9
    adam_beta2 = 0.999
    adam_epsilon = 1e-8
    lr_scheduler_kwargs = None

    def __post_init__(self) -> None:
        pass


@dataclass
class Arguments(ExtrapArguments, FewArguments):
    """The fields of the extrapolation, with few others."""


NAMES = sorted(field.name for field in dataclasses.fields(ExtrapArguments))
ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    **{f"extrap_{name}": values for name, values in RIGHT.items()},
    "extrap": st.sampled_from([*PRESETS]),
    "extrap_virtual_workers": st.integers(0, 4),
    "gradient_accumulation_steps": st.integers(1, 4),
    "lr_scaling": st.sampled_from(["none", "linear", "sqrt"]),
    "base_batch_size": NUMBERS,
    "warmup_epochs": NUMBERS,
    "lr_milestones": st.lists(st.floats(0, 1), max_size=3),
    "max_skipped_steps": st.integers(0, 3) | st.none(),
    "local_steps": st.integers(0, 3),
    "sgd_momentum": NUMBERS,
    "base_optimizer": st.sampled_from(["nadam", "lars", "rprop", "lbfgs", "mystery", None]),
    "optim": st.sampled_from(["sgd", "adamw_torch"]),
}


@cases(500, 12_000)
@given(
    some_of(ARGUMENTS),
    st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=1),
)
def test_training_arguments(fields: dict[str, Any], wrong: dict[str, Any]) -> None:
    with refused_or_done():
        arguments = Arguments(**fields | wrong)
        config = arguments.extrap_config()
        assert_read_back(config)
