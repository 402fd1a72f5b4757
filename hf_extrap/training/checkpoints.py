"""Checkpoints: what each process saves for itself, and whether a checkpoint is complete and of the same model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


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
    own = [path.name, f"rng_state_{rank}.pth" if processes > 1 else "rng_state.pth"]
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


def check_checkpoint_matches(checkpoint: str | Path, model: nn.Module) -> None:
    """Refuse a checkpoint whose model.safetensors, whole or in shards, does not fit the model; only headers are read.

    Tied weights may be stored under any one of their names.

    Raises:
        FileNotFoundError: the folder or its weights are missing.
        ValueError: the weights are unreadable, or a name or a shape differs: it is the checkpoint of another model.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist.")
    stored = _stored_shapes(folder)
    another = f"checkpoint {folder} is of another model:"
    tensors = model.state_dict()
    for name, shape in stored.items():
        if name not in tensors:
            raise ValueError(f"{another} this one has no weight {name!r}.")
        if shape != tuple(tensors[name].shape):
            raise ValueError(f"{another} {name} has shape {list(shape)} there and {list(tensors[name].shape)} here.")
    # Tied weights share memory and are stored once.
    groups: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    # Such as sinusoidal positions, which the model computes.
    attributes = ("_keys_to_ignore_on_save", "_keys_to_ignore_on_load_missing")
    unsaved = [pattern for attribute in attributes for pattern in getattr(model, attribute, None) or ()]
    for names in groups.values():
        if not any(name in stored or any(re.search(pattern, name) for pattern in unsaved) for name in names):
            raise ValueError(f"{another} it has no weight {names[0]!r}.")


def shard_names(index: Path) -> list[str]:
    """Names of the files in an index of shards; ValueError unless all are names of files in the index's own folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # A name such as ../x would lead out of the folder.
        if wrong := [name for name in names if Path(name).name != name or name in ("", "..")]:
            raise ValueError(f"it names {wrong[0]!r:.100}")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is not an index of weights: {error}; allowed: names of files beside it.") from error
    return names


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    index, files = folder / INDEX_FILE, [WEIGHTS_FILE]
    if index.is_file():
        files = shard_names(index)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {folder} has no {name}.")
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"checkpoint file {path} is damaged: {error}.") from error
    return shapes
