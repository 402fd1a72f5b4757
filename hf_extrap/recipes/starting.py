"""A first configuration for a dataset of the Hub or a folder: the task, its columns, and sizes that fit the data."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from hf_extrap.recipes import TASKS, get_task
from hf_extrap.recipes.configuration import make_parser
from hf_extrap.recipes.data import ALLOWED_NAMES, SPLITS, split_files
from hf_extrap.training.extras import extra

LOOKED_AT = 2000
"""Rows of the training data that are counted, to choose a batch size."""

ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
STARTING: dict[str, dict[str, Any]] = {
    "language_modeling": {
        **{"extrap": "past-update", "seq_len": 30, "hidden_size": 128, "num_hidden_layers": 1, "dropout": 0.2},
        **{"per_device_train_batch_size": 16, "num_train_epochs": 8, **ADAM, "max_grad_norm": 0.5},
    },
    "translation": {
        **{"extrap": "past-update", "source_lang": "en", "target_lang": "de", "vocab_size": 1500, "max_length": 64},
        **{"batch_tokens": 512, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "attention_heads": 4},
        **{"ffn_dim": 256, "num_beams": 4, "num_train_epochs": 10, **ADAM, "label_smoothing_factor": 0.1},
    },
    "image_classification": {
        **{"extrap": "extrap-past", "depth": 8, "width": 16, "per_device_train_batch_size": 64},
        **{"num_train_epochs": 10, "optim": "sgd", "sgd_momentum": 0.9, "sgd_nesterov": True, "weight_decay": 1e-4},
        **{"learning_rate": 0.05, "lr_scheduler_type": "cosine", "warmup_epochs": 1},
    },
}
"""Fields of a small model of each task, which trains in minutes; extrapolations as README.md starts with."""
ALWAYS = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_steps": 10, "seed": 0}


@dataclass(frozen=True)
class Found:
    """Data that were looked at: the task that they are for, the fields that they need, and a sentence about them."""

    task: str
    fields: dict[str, Any]
    sentence: str


def look_at(name: str, task: str | None = None) -> Found:
    """Look at the data in a folder, of a name on the Hub, or `builtin`, without writing anything.

    Raises:
        FileNotFoundError: it is neither a folder nor found on the Hub, and no task is given.
        ValueError: a split or the columns of a task are missing.
    """
    if task is not None:
        get_task(task)
    if name == "builtin":
        task = task or "language_modeling"
        return Found(task, {"dataset": name}, f"Found the built-in data of {task}.")
    if Path(name).is_dir():
        where, splits = {"data_dir": name}, _open_folder(Path(name))
    else:
        where = {"dataset": name}
        try:
            splits = _open_hub(name)
        except FileNotFoundError:
            if task is None:
                raise
            return Found(task, where, f"Did not find {name!r} on the Hub, and wrote the fields of {task}.")
    train = splits["train"]
    rows = list(islice(train, LOOKED_AT))
    if not rows:
        raise ValueError(f"split 'train' of {name!r} is empty; allowed: at least one row.")
    task, fields = _by_columns(name, rows, task)
    needed = [split for split in SPLITS if split != "validation" or task != "image_classification"]
    if missing := [split for split in needed if split not in splits]:
        raise ValueError(f"{name!r} has no split {missing[0]!r}; allowed: {', '.join(needed)}.")
    if task == "language_modeling":
        fields |= _text_sizes(splits)
    if task == "image_classification" and "validation" not in splits:
        fields["validation_samples"] = max(1, len(rows) // 10)
    count = f"{len(rows):,}" if len(rows) < LOOKED_AT else f"at least {LOOKED_AT:,}"
    sentence = f"Found {', '.join(splits)} with columns {', '.join(rows[0])} and {count} training rows: {task}."
    return Found(task, {**where, **fields}, sentence)


def first_configuration(found: Found) -> str:
    """The YAML of a run on these data, with the description of each field as its comment."""
    fields = {"task": found.task, **found.fields, **STARTING[found.task], **found.fields, **ALWAYS}
    helps = {
        field.name: " ".join(str(field.metadata.get("help", "")).split())
        for kind in make_parser(get_task(found.task)).dataclass_types
        for field in dataclasses.fields(kind)
    }
    lines = [
        f"# {found.sentence}",
        "# Train with it: hf-extrap train FILE; what it costs: hf-extrap train FILE --dry_run.",
    ]
    for name, value in fields.items():
        text = helps[name].split(". ")[0].removesuffix(".")
        lines += [
            "",
            f"# {text[:117]}{'…' * (len(text) > 117)}",
            yaml.safe_dump({name: value}, allow_unicode=True).strip(),
        ]
    return "\n".join(lines) + "\n"


def _by_columns(name: str, rows: list[dict[str, Any]], task: str | None) -> tuple[str, dict[str, Any]]:
    """The task, and the fields of its columns."""
    first = rows[0]
    languages = first.get("translation")
    keys = list(languages) if isinstance(languages, dict) else [key for key in first if len(key) == 2 and key.islower()]
    images = [key for key, value in first.items() if isinstance(value, Mapping) and "bytes" in value]
    labels = [key for key, value in first.items() if type(value) is int]
    candidates: dict[str, bool] = {
        "translation": len(keys) >= 2 and all(isinstance((languages or first)[key], str) for key in keys[:2]),
        "image_classification": bool(images and labels),
        "language_modeling": isinstance(first.get("text"), str),
    }
    task = task or next((each for each, fits in candidates.items() if fits), None)
    if task is None or not candidates[task]:
        raise ValueError(
            f"{name!r} has the columns {', '.join(first)}; allowed: `text`; `translation` or a column for each of two "
            f"languages; or images and whole numbers as their classes{f', for {task}' if task else ''}."
        )
    if task == "translation":
        source = "en" if "en" in keys else keys[0]
        return task, {"source_lang": source, "target_lang": next(key for key in keys if key != source)}
    if task == "image_classification":
        label = "label" if "label" in labels else labels[0]
        batch = _power_of_two(len(rows) // 4, most=64)
        return task, {"image_column": images[0], "label_column": label, "per_device_train_batch_size": batch}
    return task, {}


def _text_sizes(splits: Mapping[str, Any]) -> dict[str, int]:
    """Sizes with which each split fills its streams."""
    words = {
        split: sum(len(str(row["text"]).split()) + 1 for row in islice(splits[split], LOOKED_AT)) for split in SPLITS
    }
    shortest = min(words["validation"], words["test"])
    length = max(1, min(30, words["train"] // 40, shortest // 4))
    return {
        "seq_len": length,
        "per_device_train_batch_size": _power_of_two(words["train"] // length // 8, most=16),
        "per_device_eval_batch_size": _power_of_two(shortest // length // 2, most=16),
    }


def _power_of_two(limit: int, most: int) -> int:
    return min(most, 1 << max(limit, 1).bit_length() - 1)


def _open_folder(folder: Path) -> dict[str, Any]:
    """The splits of a folder, read row by row when they are iterated."""
    with extra("recipes"):
        import datasets
    opened = {}
    files = {split: found[0] for split in SPLITS if (found := split_files(folder, split))}
    # For its locks.
    with tempfile.TemporaryDirectory(prefix="hf_extrap_") as cache:
        for split, (path, reader) in files.items():
            words = {"data_files": str(path), "split": "train", "streaming": True, "cache_dir": cache}
            opened[split] = _undecoded(datasets.load_dataset(reader, **words))  # nosec B615 # local
    if "train" not in opened:
        raise ValueError(f"folder {str(folder)!r} has no file for split 'train'; allowed: {ALLOWED_NAMES}.")
    return opened


def _open_hub(name: str) -> dict[str, Any]:
    with extra("recipes"):
        import datasets
    try:
        opened = datasets.load_dataset(name, streaming=True)  # nosec B615 # the user names it
    # Offline, without this name, private: the Hub's client has many errors.
    except Exception as error:
        reason = " ".join(str(error).split())[:200].removesuffix(".")
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor found on the Hub ({reason}); --task, one of {', '.join(TASKS)}, writes "
            "a configuration without looking."
        ) from error
    return {split: _undecoded(rows) for split, rows in opened.items()}


def _undecoded(rows: Any) -> Any:
    """The rows with images as their bytes."""
    # Text has no known features, and nothing to decode.
    return rows if rows.features is None else rows.decode(False)
