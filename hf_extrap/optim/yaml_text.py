"""Reading of YAML, with limits that keep an untrusted file from exhausting time or memory."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

#: Characters, levels of nesting, and values, each alias counted as all values that it stands for.
LONGEST, DEEPEST, MOST_VALUES = 1_000_000, 50, 20_000


@cache
def _loader() -> type[yaml.SafeLoader]:
    """The loader, made on first use: this layer needs torch alone."""
    import yaml

    class _Loader(yaml.SafeLoader):
        """YAML 1.2's booleans, so that `save_strategy: no` is a string, and the limits above."""

        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def __init__(self, text: str) -> None:
            super().__init__(text)
            self._depth = 0
            self._values: dict[yaml.Node, int] = {}

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            self._depth += 1
            if self._depth > DEEPEST:
                raise self._exceeds(f"it has more than {DEEPEST} levels")
            is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
            node = super().compose_node(parent, index)
            self._depth -= 1
            if is_alias and node not in self._values:
                raise yaml.MarkedYAMLError(problem="an alias stands inside the value that it names", problem_mark=mark)
            if node is not None and not is_alias:
                self._values[node] = 1 + sum(self._values[child] for child in _children(node))
                # Every value has at least one character, so that counting stops soon after the limit.
                if max(self._values[node], len(self._values)) > MOST_VALUES:
                    raise self._exceeds(f"it has more than {MOST_VALUES:,} values, those of its aliases included")
            return node

        def _exceeds(self, limit: str) -> yaml.MarkedYAMLError:
            return yaml.MarkedYAMLError(problem=limit, problem_mark=self.peek_event().start_mark)

    _Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    return _Loader


def read_yaml(text: str, name: str) -> Any:
    """Read YAML of plain values: no tag constructs an object.

    Raises:
        ValueError: in one sentence that begins with `name`: the text is not YAML, or exceeds a limit.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{name} has {len(text):,} characters; allowed: {LONGEST:,}.")
    import yaml

    try:
        return yaml.load(text, Loader=_loader())  # nosec B506 # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise ValueError(f"{name} is not valid YAML{where}: {reason}.") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's constructors of values raise them, such as for the date 2024-13-45.
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split()).removesuffix('.')}.") from error


def _children(node: yaml.Node) -> list[yaml.Node]:
    if node.id == "mapping":
        return [child for pair in node.value for child in pair]
    return list(node.value) if node.id == "sequence" else []
