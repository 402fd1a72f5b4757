"""Whether the weights of a checkpoint fit a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


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
