"""The types and ranges of training arguments: another value is refused, with the field's name."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

#: Smallest values of fields of `TrainingArguments`, which it does not check itself.
LEAST: dict[str, float] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), 1),
    **dict.fromkeys("learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps num_train_epochs".split(), 0),
    **dict.fromkeys("seed data_seed dataloader_num_workers label_smoothing_factor neftune_noise_alpha".split(), 0),
}


def check_types(arguments: Any, fields_of: type, left_out: set[str]) -> None:
    """Refuse a value that does not have the type of its field.

    Args:
        arguments: whose values are checked.
        fields_of: the dataclass whose fields are checked.
        left_out: fields that are checked elsewhere.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    kinds = get_type_hints(fields_of)
    for field in dataclasses.fields(fields_of):
        value = getattr(arguments, field.name)
        if field.name not in left_out and not _has_type(value, kinds[field.name]):
            raise ValueError(f"{field.name} is {value!r}; allowed: {_described(kinds[field.name])}.")


def check_numbers(arguments: Any) -> None:
    """Raise a ValueError for a number that is not finite, a whole number of over 64 bits, or one below `LEAST`.

    Args:
        arguments: a dataclass; a default is not checked.
    """
    for each in dataclasses.fields(arguments):
        value, least = getattr(arguments, each.name, None), LEAST.get(each.name, -math.inf)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float) or number == each.default:
                continue
            if not (abs(number) < 2**63 if isinstance(number, int) else math.isfinite(number)):
                # The digits of a whole number may be many.
                shown = number if isinstance(number, float) else f"a whole number of {number.bit_length()} bits"
                allowed = "a finite number" if isinstance(number, float) else "one of at most 63 bits"
                raise ValueError(f"{each.name} is {shown}; allowed: {allowed}.")
            if number < least:
                raise ValueError(f"{each.name} is {number}; allowed: a number >= {least:g}.")
            if "seed" in each.name and number >= 2**32:
                raise ValueError(f"{each.name} is {number}; allowed: a whole number below 2 ** 32.")


def _has_type(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_has_type(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is list:
        return isinstance(value, list) and all(_has_type(item, parts[0]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _described(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return ", or ".join(map(_described, parts))
    if origin is Literal:
        return ", ".join(parts)
    if origin is list:
        return f"a list, each item {_described(parts[0])}"
    return {float: "a number", int: "a whole number", bool: "true, false", str: "a string"}.get(kind, "none")
