"""A configuration as a dictionary, JSON or YAML."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
else:
    DataclassInstance = object


class Serializable(DataclassInstance):
    """Reads and writes a dataclass whose fields are numbers, strings and None."""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The configuration with these fields; an unknown one is a ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(f"unknown extrap field {unknown[0]!r}; allowed: {', '.join(known)}.")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Every field by its name."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Every field, as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; a field left out keeps its default."""
        return cls.from_dict(_mapping(text, "JSON", json.loads))

    def to_yaml(self) -> str:
        """Every field, as a YAML mapping."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The inverse of `to_yaml`; a field left out keeps its default. ValueError if the text is not YAML."""
        from .yaml_text import read_yaml

        return cls.from_dict(_mapping(text, "YAML", lambda text: read_yaml(text, "the extrap configuration")))

    def save(self, path: str | Path) -> None:
        """Write YAML or JSON, by the file's ending."""
        path = Path(path)
        path.write_text(self.to_json() + "\n" if path.suffix == ".json" else self.to_yaml(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read YAML or JSON, by the file's ending."""
        path = Path(path)
        text = path.read_text(encoding="utf-8")
        return cls.from_json(text) if path.suffix == ".json" else cls.from_yaml(text)


def _mapping(text: object, language: str, parse: Callable[[str], object]) -> dict[str, Any]:
    """The fields that a text holds; parsers raise errors of many kinds, some of them not their own."""
    allowed = f"allowed: a mapping of fields in {language}."
    if not isinstance(text, str):
        raise ValueError(f"the text of an extrap configuration is a {type(text).__name__}; {allowed}")
    try:
        fields = parse(text)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the text of an extrap configuration is no {language} ({reason}); {allowed}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"the text of an extrap configuration is a {type(fields).__name__}; {allowed}")
    return fields
