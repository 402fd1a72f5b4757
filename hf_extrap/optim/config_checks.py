"""What the fields of `ExtrapConfig` may be, alone and together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

Direction = Literal["none", "gradient", "past_gradient", "past_update", "gaussian", "uniform"]
Scope = Literal["local", "global"]
Scaling = Literal["none", "norm", "layer", "filter", "adaptive", "step", "layer_step"]
Batch = Literal["same", "independent"]
DirectionDtype = Literal["float32", "bfloat16", "float16"]
DirectionDevice = Literal["cpu"]

STEP_SCALINGS: tuple[str, ...] = ("step", "layer_step")
"""Scalings by which the step size is a share of the last step of x."""


def check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse a field whose value is not allowed, with a ValueError."""

    def check(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {fields[name]!r}; allowed: {allowed}.")

    for name, choices in (
        ("direction", get_args(Direction)),
        ("scope", get_args(Scope)),
        ("scaling", get_args(Scaling)),
        ("batch", get_args(Batch)),
        ("direction_dtype", (None, *get_args(DirectionDtype))),
        ("direction_device", (None, *get_args(DirectionDevice))),
    ):
        value = fields[name]
        listed = ", ".join("none" if choice is None else choice for choice in choices)
        check(name, (value is None or isinstance(value, str)) and value in choices, listed)
    for name in ("ascent", "anneal", "precondition", "check_finite"):
        check(name, isinstance(fields[name], bool), "true, false")
    check("swap", fields["swap"] is None or isinstance(fields["swap"], bool), "true, false, none")
    fraction, share, cap = (fields[name] for name in ("batch_fraction", "curvature_share", "max_displacement"))
    check("batch_fraction", _is_number(fraction) and 0 < fraction <= 1, "a number in (0, 1]")
    check("curvature_share", _is_number(share) and 0 < share < 1, "a number in (0, 1)")
    check("max_displacement", cap is None or (_is_number(cap) and cap > 0), "a number > 0, or none")
    for name, least in (("probe_every", 1), ("start_step", 0), ("seed", 0)):
        check(name, _is_whole(fields[name]) and fields[name] >= least, f"a whole number >= {least}")
    start, end = fields["start_step"], fields["end_step"]
    check(
        "end_step", end is None or (_is_whole(end) and end > start), f"a whole number > start_step ({start}), or none"
    )
    # A length of 0 is the base optimizer alone: allowed, as the end of a sweep.
    for name, word in (("step_size", "auto"), ("step_ratio", None)):
        value = fields[name]
        is_word = isinstance(value, str) and value == word
        allowed = "a number >= 0" + (f" or {word!r}" if word else "")
        check(name, value is None or is_word or (_is_number(value) and value >= 0), allowed)


def check_combination(fields: Mapping[str, Any]) -> None:
    """Refuse fields that do not go together, with a ValueError."""
    direction, scaling, size, ratio = (fields[name] for name in ("direction", "scaling", "step_size", "step_ratio"))
    if direction == "none":
        if size is not None or ratio is not None:
            raise ValueError("step_size and step_ratio need a direction, and direction is 'none'.")
        return
    if fields["precondition"] and direction not in ("gradient", "past_gradient"):
        raise ValueError(
            f"precondition is true, and direction is {direction!r}; allowed: gradient, past_gradient (a past_update is "
            "preconditioned already)."
        )
    if (size is None) == (ratio is None):
        given = "neither" if size is None else "both"
        raise ValueError(f"step_size and step_ratio: {given} given; allowed: exactly one of them.")
    if scaling in STEP_SCALINGS and ratio is not None:
        raise ValueError(
            f"scaling is {scaling!r}, which follows the learning rate by itself, and step_ratio is {ratio}; allowed: "
            "step_size, a share of the last step."
        )
    if size == "auto":
        _check_auto(fields)


def _check_auto(fields: Mapping[str, Any]) -> None:
    direction, dtype, batch = fields["direction"], fields["direction_dtype"], fields["batch"]
    if direction in ("gaussian", "uniform"):
        raise ValueError(f"step_size is 'auto', which cannot measure along {direction} noise; give a number.")
    if dtype in ("bfloat16", "float16"):
        raise ValueError(
            f"step_size is 'auto', which needs directions in full precision, not direction_dtype {dtype!r}; allowed: "
            "float32, or none."
        )
    if fields["scaling"] != "none":
        raise ValueError(f"step_size is 'auto', which needs scaling 'none', not {fields['scaling']!r}.")
    if direction == "gradient" and (batch != "same" or fields["batch_fraction"] != 1):
        raise ValueError(
            "step_size is 'auto', which compares two gradients of one batch: it needs batch 'same' and batch_fraction "
            f"1, not {batch!r} and {fields['batch_fraction']}."
        )


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
