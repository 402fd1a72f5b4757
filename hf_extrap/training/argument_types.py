"""The types of training arguments: a value of another type is refused, with the field's name."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


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
