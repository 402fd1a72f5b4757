"""What the fields of `ExtrapConfig` may be, alone and together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from .config import ExtrapConfig

Direction = Literal["none", "gradient", "past_gradient", "past_update", "gaussian", "uniform"]
Scope = Literal["local", "global"]
Scaling = Literal["none", "norm", "layer", "filter", "adaptive", "step", "layer_step"]
Batch = Literal["same", "independent"]
DirectionDtype = Literal["float32", "bfloat16", "float16"]
DirectionDevice = Literal["cpu"]


def check_fields(config: ExtrapConfig) -> None:
    """Refuse a field whose value is not allowed, with a ValueError."""
    for name, choices in (
        ("direction", get_args(Direction)),
        ("scope", get_args(Scope)),
        ("scaling", get_args(Scaling)),
        ("batch", get_args(Batch)),
        ("direction_dtype", (None, *get_args(DirectionDtype))),
        ("direction_device", (None, *get_args(DirectionDevice))),
    ):
        value = getattr(config, name)
        _check(config, name, (value is None or isinstance(value, str)) and value in choices, _listed(choices))
    for name in ("ascent", "anneal", "precondition", "check_finite"):
        _check(config, name, isinstance(getattr(config, name), bool), "true, false")
    _check(config, "swap", config.swap is None or isinstance(config.swap, bool), "true, false, none")
    fraction, share, cap = config.batch_fraction, config.curvature_share, config.max_displacement
    _check(config, "batch_fraction", _is_number(fraction) and 0 < fraction <= 1, "a number in (0, 1]")
    _check(config, "curvature_share", _is_number(share) and 0 < share < 1, "a number in (0, 1)")
    _check(config, "max_displacement", cap is None or (_is_number(cap) and cap > 0), "a number > 0, or none")
    for name, least in (("probe_every", 1), ("start_step", 0), ("seed", 0)):
        value = getattr(config, name)
        _check(config, name, _is_whole(value) and value >= least, f"a whole number >= {least}")
    end = config.end_step
    after_start = end is None or (_is_whole(end) and end > config.start_step)
    _check(config, "end_step", after_start, f"a whole number > start_step ({config.start_step}), or none")
    # A length of 0 is the base optimizer alone: allowed, as the end of a sweep.
    for name, word in (("step_size", "auto"), ("step_ratio", None)):
        value = getattr(config, name)
        is_word = isinstance(value, str) and value == word
        allowed = "a number >= 0" + (f" or {word!r}" if word else "")
        _check(config, name, value is None or is_word or (_is_number(value) and value >= 0), allowed)


def _check(config: ExtrapConfig, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {getattr(config, name)!r}; allowed: {allowed}.")


def check_combination(config: ExtrapConfig) -> None:
    """Refuse fields that do not go together, with a ValueError."""
    if config.direction == "none":
        if config.step_size is not None or config.step_ratio is not None:
            raise ValueError("step_size and step_ratio need a direction, and direction is 'none'.")
        return
    if config.precondition and config.direction not in ("gradient", "past_gradient"):
        raise ValueError(
            f"precondition is true, and direction is {config.direction!r}; allowed: gradient, past_gradient (a "
            "past_update is preconditioned already)."
        )
    if (config.step_size is None) == (config.step_ratio is None):
        given = "neither" if config.step_size is None else "both"
        raise ValueError(f"step_size and step_ratio: {given} given; allowed: exactly one of them.")
    if config.scales_by_step and config.step_ratio is not None:
        raise ValueError(
            f"scaling is {config.scaling!r}, which follows the learning rate by itself, and step_ratio is "
            f"{config.step_ratio}; allowed: step_size, a share of the last step."
        )
    if config.step_size == "auto":
        _check_auto(config)


def _check_auto(config: ExtrapConfig) -> None:
    if config.is_noise:
        raise ValueError(f"step_size is 'auto', which cannot measure along {config.direction} noise; give a number.")
    if config.direction_dtype in ("bfloat16", "float16"):
        raise ValueError(
            f"step_size is 'auto', which needs directions in full precision, not direction_dtype "
            f"{config.direction_dtype!r}; allowed: float32, or none."
        )
    if config.scaling != "none":
        raise ValueError(f"step_size is 'auto', which needs scaling 'none', not {config.scaling!r}.")
    if config.is_fresh and (config.batch != "same" or config.batch_fraction != 1):
        raise ValueError(
            "step_size is 'auto', which compares two gradients of one batch: it needs batch 'same' and "
            f"batch_fraction 1, not {config.batch!r} and {config.batch_fraction}."
        )


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(names: Any) -> str:
    return ", ".join("none" if name is None else str(name) for name in names)
