"""Dataclasses from the mappings of a YAML file: no key is unknown, none is missing, every value has its type."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal


def build(kind: Any, content: Any, where: str = "") -> Any:
    """An instance of a dataclass from a mapping.

    Args:
        kind: the dataclass; a key is the name of a field, without a trailing underscore.
        content: the mapping.
        where: its place in the file, for errors.

    Raises:
        ValueError: in one sentence that names the place, the value and what is allowed.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where or 'the study'} is {content!r}; allowed: a mapping.")
    hints = typing.get_type_hints(kind)
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else f"; allowed: {listed(fields)}"
            raise ValueError(f"{_at(where, key)} is unknown{hint}.")
    for key, f in fields.items():
        if key not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_at(where, key)} is missing.")
    given = {
        fields[key].name: _convert(hints[fields[key].name], value, _at(where, key)) for key, value in content.items()
    }
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        nested = [option for option in options if dataclasses.is_dataclass(option)]
        if nested and isinstance(value, dict):
            return build(nested[0], value, where)
        return _convert(options[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}; allowed: {listed(arguments)}.")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; allowed: a list.")
        return [_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where} is {value!r}; allowed: a mapping of names.")
        return {key: _convert(arguments[1], item, _at(where, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and (found := number(value)) is not None:
        return found
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "Path": "a path"}
    raise ValueError(f"{where} is {value!r}; allowed: {words[kind.__name__]}.")


def number(value: Any) -> float | None:
    """A finite number; YAML reads 1e-3, without a point, as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _at(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def listed(names: Iterable[Any]) -> str:
    """The names as people write them."""
    return ", ".join(str(name) for name in names)
