"""Labelled images: the digits of scikit-learn, stratified splits, decoded images cached on disk, and augmentation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import default_data_collator
from transformers.utils.logging import tqdm

from hf_extrap.recipes.data import cached_folder
from hf_extrap.training.extras import extra

with extra("recipes"):
    import datasets

#: Increase it when the format of prepared data changes.
CACHE_VERSION = 1
#: Splits do not depend on the seed of the training.
SPLIT_SEED = 0
DIGITS_VALIDATION, DIGITS_TEST = 297, 360


def builtin_digits() -> datasets.DatasetDict:
    """Return scikit-learn's 1,797 handwritten digits, 8 × 8 grey: 1,140 for train, 297 for validation, 360 for test."""
    with extra("recipes"):
        from PIL import Image
        from sklearn.datasets import load_digits

    digits = load_digits()
    rows = datasets.Dataset.from_dict(
        {
            "img": [Image.fromarray(image) for image in (digits.images * 255 / 16).round().astype(np.uint8)],
            "label": digits.target,
        },
        features=datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
        ),
    )
    rest, test = stratified_cut(rows, DIGITS_TEST, "label")
    train, validation = stratified_cut(rest, DIGITS_VALIDATION, "label")
    return datasets.DatasetDict({"train": train, "validation": validation, "test": test})


def stratified_cut(rows: datasets.Dataset, size: int, label_column: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The remaining rows and `size` random ones, always the same and with equal shares of every class, all in order.

    ValueError if there are too few rows, or no labels.
    """
    with extra("recipes"):
        from sklearn.model_selection import train_test_split

    if label_column not in rows.column_names:
        raise ValueError(f"the training split has no column {label_column!r}: it has {rows.column_names}.")
    labels = np.asarray(rows[label_column])
    try:
        parts = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=SPLIT_SEED)
    except ValueError as error:
        raise ValueError(f"{size} rows cannot be cut off a training split of {len(labels)}: {error}") from error
    kept, cut = (rows.select(np.sort(part)) for part in parts)
    return kept, cut


def random_rows(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Select `count` rows at random, always the same ones: files are often sorted by class."""
    return rows.select(np.sort(np.random.default_rng(SPLIT_SEED).permutation(len(rows))[:count]))


@dataclass
class ImageDataset(Dataset):
    """Images, (images, 3, height, width) uint8, in memory or mapped from disk, and labels, (images,) int64."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": torch.from_numpy(self.images[index].copy()), "labels": int(self.labels[index])}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a whole batch, for `collate`."""
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
    """Stack single items; a whole batch of an `ImageDataset` is returned unchanged."""
    return batch if isinstance(batch, dict) else default_data_collator(batch)


def decode(
    splits: datasets.DatasetDict, cache_root: Path, image_column: str, label_column: str
) -> dict[str, ImageDataset]:
    """Decode every image to RGB; the bytes are cached under a fingerprint of the image files.

    Images have the feature `Image` and any file format; labels are classes, numbered from 0.

    Raises:
        ValueError: if a column has another type, an image cannot be read, or images differ in size.
    """
    found: dict[str, ImageDataset] = {}
    digest = hashlib.blake2b(json.dumps(CACHE_VERSION).encode(), digest_size=12)
    for name, split in splits.items():
        feature = split.features[image_column]
        if not isinstance(feature, datasets.Image):
            raise ValueError(f"column {image_column!r} of split {name!r} holds {feature}; allowed: the feature Image.")
        digest.update(f"{name} {len(split)}".encode())
        files = split.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        for batch in files.iter(batch_size=1000):
            for file in batch[image_column]:
                if file is None:
                    raise ValueError(f"split {name!r} has a row without an image; allowed: images.")
                digest.update(file["bytes"] if file["bytes"] is not None else Path(file["path"]).read_bytes())

    def build(folder: Path) -> None:
        for name, split in splits.items():
            np.save(folder / f"{name}.npy", _decode(split, name, image_column), allow_pickle=False)

    folder = cached_folder(cache_root / "images", digest.hexdigest(), build)
    for name, split in splits.items():
        labels = np.asarray(split[label_column])
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise ValueError(f"column {label_column!r} of split {name!r} holds no classes; allowed: integers from 0.")
        images = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        found[name] = ImageDataset(images, labels.astype(np.int64))
    sizes = {name: part.images.shape[2:] for name, part in found.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"images differ in size between the splits: {sizes}; allowed: one size.")
    return found


def _decode(split: datasets.Dataset, name: str, image_column: str) -> np.ndarray:
    images: np.ndarray | None = None
    rows = split.select_columns(image_column)
    for index in tqdm(range(len(rows)), desc=f"Decoding {name}", leave=False):
        try:
            image = np.asarray(rows[index][image_column].convert("RGB")).transpose(2, 0, 1)
        # Decoders of damaged files raise errors of many types.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"image {index} of split {name!r} cannot be decoded: {reason}.") from error
        if images is None:
            images = np.empty((len(split), *image.shape), dtype=np.uint8)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"image {index} of split {name!r} has {image.shape[1:]} pixels and the first {images.shape[2:]}; "
                "allowed: one size."
            )
        images[index] = image
    assert images is not None  # load_splits refuses empty splits
    return images


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad images, (batch, channels, height, width), with zeros and crop each to its size at a random position."""
    height, width = images.shape[-2:]
    # (batch, channels, 2 padding + 1, 2 padding + 1, height, width): a view of every crop.
    crops = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    corner = torch.randint(2 * padding + 1, (2, len(images)), generator=generator, device=images.device)
    return crops[torch.arange(len(images), device=images.device), :, corner[0], corner[1]]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image, (batch, channels, height, width), horizontally with probability 1/2."""
    flipped = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)


@dataclass(frozen=True)
class Augmentation:
    """Random crop, with that padding in pixels or 0 for none, and random flip of a batch's `pixel_values`."""

    crop: int
    flip: bool

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the batch with augmented `pixel_values`; the generator is the only source of randomness."""
        images = batch["pixel_values"]
        if self.crop:
            images = random_crop(images, self.crop, generator)
        if self.flip:
            images = random_flip(images, generator)
        return {**batch, "pixel_values": images}
