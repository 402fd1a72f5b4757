"""Describes dataclass fields on the site by the text that `--help` prints: their metadata, read without importing."""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension


class DescribedFields(Extension):
    """Gives an attribute `name: type = described(default, text)` its text, and its default as the value."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **kwargs: Any) -> None:
        """Read the call of `described`, of `_override`, or of `field` with a description in its metadata."""
        call = getattr(node, "value", None)
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or attr.docstring is not None:
            return
        words = {keyword.arg: keyword.value for keyword in call.keywords}
        arguments: dict[str, tuple[str, ast.expr | None]] = {
            "described": (ast.unparse(call.args[0]) if call.args else "", call.args[-1] if call.args else None),
            "_override": ("None", call.args[-1] if call.args else None),
            "field": ("list()", words.get("metadata")),
        }
        if call.func.id not in arguments:
            return
        default, text = arguments[call.func.id]
        if isinstance(text, ast.Dict):
            text = text.values[0]
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            attr.docstring = Docstring(text.value, parent=attr)
            attr.value = default
