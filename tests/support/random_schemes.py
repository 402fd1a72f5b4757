"""Random fields of a configuration, and random configurations that are allowed."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import strategies as st

from hf_extrap import PRESETS, ExtrapConfig
from hf_extrap.optim.config_checks import Batch, Direction, DirectionDevice, DirectionDtype, Scaling, Scope

NUMBERS = st.floats(0, 2) | st.sampled_from([0, 1, 0.5, 0.3])
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "direction": st.sampled_from(get_args(Direction)),
    "scope": st.sampled_from(get_args(Scope)),
    "scaling": st.sampled_from(get_args(Scaling)),
    "step_size": NUMBERS | st.just("auto") | st.none(),
    "step_ratio": NUMBERS | st.none(),
    "curvature_share": st.floats(0, 1),
    "ascent": st.booleans(),
    "precondition": st.booleans(),
    "batch": st.sampled_from(get_args(Batch)),
    "batch_fraction": st.floats(0, 1),
    "anneal": st.booleans(),
    "probe_every": st.integers(0, 20),
    "max_displacement": NUMBERS | st.none(),
    "start_step": st.integers(0, 20),
    "end_step": st.integers(0, 20) | st.none(),
    "direction_dtype": st.sampled_from([None, *get_args(DirectionDtype)]),
    "direction_device": st.sampled_from([None, *get_args(DirectionDevice)]),
    "swap": st.booleans() | st.none(),
    "check_finite": st.booleans(),
    "seed": st.integers(0, 2**70),
}
"""Values of the right type for each field, most of them allowed."""


def some_of(values: dict[str, st.SearchStrategy[Any]], most: int = 5) -> st.SearchStrategy[dict[str, Any]]:
    """A few fields with values of theirs."""
    pairs = [st.tuples(st.just(name), of_name) for name, of_name in values.items()]
    return st.lists(st.one_of(pairs), max_size=most).map(dict)


SOME_FIELDS = some_of(RIGHT)


def _scheme(preset: str, fields: dict[str, Any]) -> ExtrapConfig:
    """The preset with as many of the fields as are allowed, one after another."""
    config, taken = ExtrapConfig.preset(preset), dict[str, Any]()
    for name, value in fields.items():
        try:
            config = ExtrapConfig.preset(preset, **taken, **{name: value})
        except ValueError:
            continue
        taken[name] = value
    return config


SCHEMES = st.builds(_scheme, st.sampled_from(sorted(PRESETS)), some_of(RIGHT, most=4))
"""Configurations that are allowed."""
