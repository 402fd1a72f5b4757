"""Whether a checkpoint on disk belongs to a model, read from its header alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def check_checkpoint_matches(checkpoint: str | Path, model: nn.Module) -> None:
    """Refuse a checkpoint whose tensors do not fit the model.

    Args:
        checkpoint: folder that holds model.safetensors, whole or in shards.
        model: the model that is to receive them. Tied weights may be stored under any one of their names.

    Raises:
        FileNotFoundError: the folder or its weights are missing.
        ValueError: the weights are unreadable, or a name or a shape differs: it is the checkpoint of another model.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist.")
    stored = _stored_shapes(folder)
    # Tied weights share memory and are stored once.
    expected: dict[str, tuple[int, ...]] = {}
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, tensor in model.state_dict().items():
        expected[name] = tuple(tensor.shape)
        groups.setdefault((tensor.data_ptr(), tuple(tensor.shape)), []).append(name)
    for name, shape in stored.items():
        if name not in expected:
            raise ValueError(f"checkpoint {folder} is of another model: this one has no weight {name!r}.")
        if shape != expected[name]:
            raise ValueError(
                f"checkpoint {folder} is of another model: {name} has shape {list(shape)} there and "
                f"{list(expected[name])} here."
            )
    # Such as sinusoidal positions, which the model makes anew.
    unsaved = [
        re.compile(pattern)
        for attribute in ("_keys_to_ignore_on_save", "_keys_to_ignore_on_load_missing")
        for pattern in getattr(model, attribute, None) or ()
    ]
    for names in groups.values():
        if not any(name in stored or any(pattern.search(name) for pattern in unsaved) for name in names):
            raise ValueError(f"checkpoint {folder} is of another model: it has no weight {names[0]!r}.")


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    index = folder / INDEX_FILE
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = [WEIGHTS_FILE]
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
