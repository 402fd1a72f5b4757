"""Whether the weights of a checkpoint fit a model."""

from __future__ import annotations

import json
import pickle  # nosec B403: for the type of its error
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .folders import CheckpointNotFoundError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS = (WEIGHTS_FILE, "pytorch_model.bin", INDEX_FILE, "pytorch_model.bin.index.json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

Shapes = dict[str, tuple[int, ...]]


def check_checkpoint_matches(checkpoint: str | Path, model: nn.Module) -> None:
    """Refuse a checkpoint whose weights do not fit the model; no weight is read from safetensors files.

    The weights are those that the stock Trainer loads: a whole model, in one file or in shards, or the adapters of a
    PEFT model, the active one in the folder itself and several in folders named after them. Headers of safetensors are
    read; `.bin` files are mapped on the meta device with `weights_only=True`. Tied weights may be stored under any one
    of their names. FSDP's and DeepSpeed's files are not looked at.

    Raises:
        FileNotFoundError: the folder or its weights are missing; a ValueError too, as transformers raises.
        ValueError: the weights are unreadable, or a name or a shape differs: it is the checkpoint of another model.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"Can't find a valid checkpoint at {folder}: checkpoint {folder} does not exist.")
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    adapters = _adapters(folder)
    is_whole = found is not None and not found.name.endswith(".json")
    if adapters and hasattr(model, "peft_config") and not is_whole:
        _check_adapters(folder, adapters, model)
    elif found is not None:
        _check_model(folder, _stored_shapes(found), model)
    elif adapters:
        raise ValueError(f"checkpoint {folder} is of another model: it holds adapters, and this one has none.")
    elif not any(folder.glob("pytorch_model_fsdp*")):
        raise CheckpointNotFoundError(
            f"Can't find a valid checkpoint at {folder}: it has no {WEIGHTS_FILE}, nor other weights."
        )


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


def _check_model(folder: Path, stored: Shapes, model: nn.Module) -> None:
    tensors = model.state_dict()
    _check_shapes(folder, stored, tensors)
    # Tied weights share memory and are stored once.
    groups: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    # Such as sinusoidal positions, which the model computes.
    attributes = ("_keys_to_ignore_on_save", "_keys_to_ignore_on_load_missing")
    unsaved = [pattern for attribute in attributes for pattern in getattr(model, attribute, None) or ()]
    for names in groups.values():
        if not any(name in stored or any(re.search(pattern, name) for pattern in unsaved) for name in names):
            raise ValueError(f"checkpoint {folder} is of another model: it has no weight {names[0]!r}.")


def _adapters(folder: Path) -> dict[str, Path]:
    """The weights of the adapters in a checkpoint: "" for those in the folder itself, others by their folder."""
    files = [path for name in _ADAPTER_WEIGHTS for path in (*folder.glob(name), *folder.glob(f"*/{name}"))]
    return {"" if path.parent == folder else path.parent.name: path for path in reversed(files)}


def _check_adapters(folder: Path, adapters: Mapping[str, Path], model: nn.Module) -> None:
    from peft import get_peft_model_state_dict

    known: Any = model.peft_config
    tensors = model.state_dict()
    # As the stock Trainer loads them.
    first = "default" if len(adapters) > 1 or "" not in adapters else getattr(model, "active_adapters", ["default"])[0]
    for name, path in adapters.items():
        adapter = name or first
        if adapter not in known:
            # It is loaded beside those that the model has.
            continue
        own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        stored = _stored_shapes(path)
        # Embeddings are saved beside an adapter if their size has changed.
        extra = {key: tensors.get(key, tensors.get(key.replace(".weight", ".base_layer.weight"))) for key in stored}
        _check_shapes(folder, stored, {**{key: value for key, value in extra.items() if value is not None}, **own})
        if lacking := sorted(own.keys() - stored.keys()):
            raise ValueError(f"checkpoint {folder} is of another model: it has no weight {lacking[0]!r}.")


def _check_shapes(folder: Path, stored: Shapes, tensors: Mapping[str, Tensor]) -> None:
    another = f"checkpoint {folder} is of another model:"
    for name, shape in stored.items():
        if name not in tensors:
            raise ValueError(f"{another} this one has no weight {name!r}.")
        if shape != tuple(tensors[name].shape):
            raise ValueError(f"{another} {name} has shape {list(shape)} there and {list(tensors[name].shape)} here.")


def _stored_shapes(weights: Path) -> Shapes:
    """Shapes of the tensors in a file, or in the shards that an index names."""
    names = shard_names(weights) if weights.suffix == ".json" else [weights.name]
    shapes: Shapes = {}
    for path in (weights.parent / name for name in names):
        if not path.is_file():
            raise CheckpointNotFoundError(f"Can't find a valid checkpoint at {weights.parent}: it has no {path.name}.")
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            else:
                content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
                shapes |= {key: tuple(value.shape) for key, value in content.items() if isinstance(value, Tensor)}
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
            raise ValueError(f"checkpoint file {path} is damaged: {' '.join(str(error).split())[:200]}.") from error
    return shapes
