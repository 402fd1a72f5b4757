"""Labelled pictures: scikit-learn's digits, stratified splits, and decoded pictures kept on disk as bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset
from transformers.utils.logging import tqdm

from hf_extrap.recipes.task import cached_folder

#: Raised whenever prepared data of an earlier version must not be used again.
_CACHE_VERSION = 1
#: Seed of every split: the same data for every seed of the training.
_SPLIT_SEED = 0
_DIGITS_VALIDATION, _DIGITS_TEST = 297, 360


def builtin_digits() -> datasets.DatasetDict:
    """Return the 1,797 handwritten digits that come with scikit-learn, 8 × 8 grey: 1,140 to train, 297 and 360."""
    digits = load_digits()
    rows = datasets.Dataset.from_dict(
        {
            "img": [Image.fromarray(picture) for picture in (digits.images * 255 / 16).round().astype(np.uint8)],
            "label": digits.target,
        },
        features=datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
        ),
    )
    rest, test = stratified_cut(rows, _DIGITS_TEST, "label")
    train, validation = stratified_cut(rest, _DIGITS_VALIDATION, "label")
    return datasets.DatasetDict({"train": train, "validation": validation, "test": test})


def stratified_cut(rows: datasets.Dataset, size: int, label_column: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cut off `size` rows at random, with the same share of every class; the same rows each time.

    Returns:
        What remains and what was cut off, both in the order they had.

    Raises:
        ValueError: If the rows do not have so many, or so few, or have no labels.
    """
    if label_column not in rows.column_names:
        raise ValueError(f"the training split has no column {label_column!r}: it has {rows.column_names}.")
    labels = np.asarray(rows[label_column])
    try:
        parts = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=_SPLIT_SEED)
    except ValueError as error:
        raise ValueError(f"{size} rows cannot be cut off a training split of {len(labels)}: {error}") from error
    kept, cut = (rows.select(np.sort(part)) for part in parts)
    return kept, cut


def random_rows(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Return `count` rows at random, the same each time: files are often in the order of their classes."""
    return rows.select(np.sort(np.random.default_rng(_SPLIT_SEED).permutation(len(rows))[:count]))


@dataclass
class Pictures(Dataset):
    """Pictures in memory or mapped from disk.

    Attributes:
        images: (pictures, 3, height, width) uint8.
        labels: (pictures,) int64.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": torch.from_numpy(self.images[index].copy()), "labels": int(self.labels[index])}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a whole batch at once: pictures are not collated one by one."""
        rows = np.asarray(indices)
        return {"pixel_values": torch.from_numpy(self.images[rows]), "labels": torch.from_numpy(self.labels[rows])}

    def channel_moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, of values in [0, 1]."""
        levels = np.arange(256) / 255
        counts = np.stack([np.bincount(self.images[:, c].ravel(), minlength=256) for c in range(self.images.shape[1])])
        shares = counts / counts.sum(axis=1, keepdims=True)
        means = shares @ levels
        deviations = np.sqrt(np.maximum(shares @ levels**2 - means**2, 0))
        return means.tolist(), deviations.tolist()


def collate(batch: dict[str, Tensor] | list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack pictures that come one by one; a batch that `Pictures` has made whole is left as it is."""
    if isinstance(batch, dict):
        return batch
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in batch]),
        "labels": torch.tensor([row["labels"] for row in batch]),
    }


def decoded(
    splits: datasets.DatasetDict, cache_root: Path, image_column: str, label_column: str
) -> dict[str, Pictures]:
    """Decode every picture once, to RGB, or find them decoded.

    Args:
        splits: rows with a picture (the feature `Image`, of any file format) and a class number.
        cache_root: where the bytes are kept, under a fingerprint of the files in the rows.
        image_column: name of the column of pictures.
        label_column: name of the column of classes, numbered from 0.

    Raises:
        ValueError: If a column is something else, a picture cannot be read, or pictures differ in size.
    """
    for name, split in splits.items():
        if not isinstance(split.features[image_column], datasets.Image):
            raise ValueError(
                f"column {image_column!r} of split {name!r} holds {split.features[image_column]}: "
                "it must hold pictures (the feature Image of `datasets`)."
            )

    def build(folder: Path) -> None:
        for name, split in splits.items():
            np.save(folder / f"{name}.npy", _decode(split, name, image_column), allow_pickle=False)

    folder = cached_folder(cache_root / "images", _fingerprint(splits, image_column), build)
    pictures = {
        name: Pictures(
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False), _labels(split, name, label_column)
        )
        for name, split in splits.items()
    }
    sizes = {name: part.images.shape[2:] for name, part in pictures.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"pictures differ in size between the splits: {sizes}; all must have one size.")
    return pictures


def _decode(split: datasets.Dataset, name: str, image_column: str) -> np.ndarray:
    images: np.ndarray | None = None
    for index, row in enumerate(tqdm(split.select_columns(image_column), desc=f"Decoding {name}", leave=False)):
        picture = np.asarray(row[image_column].convert("RGB")).transpose(2, 0, 1)
        if images is None:
            images = np.empty((len(split), *picture.shape), dtype=np.uint8)
        if picture.shape != images.shape[1:]:
            raise ValueError(
                f"picture {index} of split {name!r} has {picture.shape[1:]} pixels and the first {images.shape[2:]}: "
                "all must have one size."
            )
        images[index] = picture
    assert images is not None  # load_splits refuses empty splits
    return images


def _labels(split: datasets.Dataset, name: str, label_column: str) -> np.ndarray:
    labels = np.asarray(split[label_column])
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"column {label_column!r} of split {name!r} is not of classes numbered from 0.")
    return labels.astype(np.int64)


def _fingerprint(splits: datasets.DatasetDict, image_column: str) -> str:
    digest = hashlib.blake2b(json.dumps(_CACHE_VERSION).encode(), digest_size=12)
    for name, split in splits.items():
        digest.update(f"{name} {len(split)}".encode())
        files = split.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        for batch in files.iter(batch_size=1000):
            for file in batch[image_column]:
                digest.update(file["bytes"] if file["bytes"] is not None else Path(file["path"]).read_bytes())
    return digest.hexdigest()
