"""What each process keeps for itself in a checkpoint: directions, recurrent states, the gradient noise scale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def rank_file(checkpoint: str | Path, rank: int) -> Path:
    """The file of one process in a checkpoint folder."""
    return Path(checkpoint) / f"extrap_rank_{rank}.safetensors"


def save_rank_state(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write named groups of tensors, and JSON facts, as one safetensors file.

    Args:
        path: of the file; its folder is made.
        tensors: by group and name.
        facts: what JSON can hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{group}/{name}": t.contiguous() for group, named in tensors.items() for name, t in named.items()}
    save_file(flat, path, metadata={"facts": json.dumps(facts)})


def load_rank_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The inverse of `save_rank_state`, on the CPU.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            groups: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118, it is no mapping
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = file.get_tensor(key)
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to go on with cold directions.") from error
    return groups, facts
