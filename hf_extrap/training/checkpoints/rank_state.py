"""What each process saves for itself in a checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass
class RankState:
    """What one process keeps for itself in a checkpoint: tensors by group and name, and values that JSON can hold."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def save_rank_state(checkpoint: str | Path, rank: int, processes: int, states: Iterable[RankState]) -> None:
    """Write what one of `processes` processes keeps for itself as one safetensors file in the checkpoint's folder."""
    folder = Path(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, object] = {"processes": processes}
    for state in states:
        facts |= state.facts
        for group, named in state.tensors.items():
            tensors |= {f"{group}/{name}": tensor.contiguous() for name, tensor in named.items()}
    save_file(tensors, folder / _rank_file(rank), metadata={"facts": json.dumps(facts)})


def load_rank_state(checkpoint: str | Path, rank: int, processes: int) -> RankState:
    """Read what `save_rank_state` wrote, on the CPU; a collective call.

    Directions and recurrent states start cold, with a warning, from a checkpoint of the stock Trainer, which has no
    such files, and from one of another number of processes.

    Raises:
        FileNotFoundError: a process has lost a file of a checkpoint that as many processes have saved.
        ValueError: the file is damaged.
    """
    folder = Path(checkpoint)
    path = folder / _rank_file(rank)
    found = path if path.is_file() else next(iter(sorted(folder.glob(_rank_file("*")))), None)
    state = _read(found) if found is not None else RankState()
    own = [path.name]
    if any(folder.glob(local_sgd_file("*"))):
        own.append(local_sgd_file(rank))
    missing = [name for name in own if not (folder / name).is_file()]
    # All processes raise together: one that trained on would wait for the others.
    reports = gather_object([(state.facts.get("processes"), missing)])
    saved = next((count for count, _ in reports if count is not None), None)
    if saved is None:
        logger.warning("%s holds no extrap_rank file: directions and recurrent states start cold", folder)
        return RankState()
    if saved != processes:
        message = "the checkpoint has %d processes and this run %d: directions and recurrent states start cold"
        logger.warning(message, saved, processes)
        return RankState(facts={name: state.facts[name] for name in ("noise_scale",) if name in state.facts})
    if lost := sorted(name for _, names in reports for name in names):
        missing_files = f"{', '.join(lost)}, which its {processes} processes have saved"
        raise FileNotFoundError(f"{folder} lacks {missing_files}; allowed: a complete checkpoint.")
    return state


def local_sgd_file(rank: int | str) -> str:
    """The name of the file with the optimizer states of one process's workers."""
    return f"local_sgd_rank_{rank}.pt"


def _rank_file(rank: int | str) -> str:
    return f"extrap_rank_{rank}.safetensors"


def _read(path: Path) -> RankState:
    state = RankState()
    try:
        with safe_open(path, framework="pt") as file:
            state.facts = json.loads(file.metadata()["facts"])
            for key in file.keys():  # noqa: SIM118, it is no mapping
                group, _, name = key.partition("/")
                state.tensors.setdefault(group, {})[name] = file.get_tensor(key)
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); allowed: resuming from another checkpoint.") from error
    return state
