"""CIFAR-10 as uint8 tensors on the device."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_extrap.recipes.image_classification.images import random_crop, random_flip

PADDING = 4
HELD_OUT = 0.1
"""Fraction of the training split that is held out for validation."""


class Split(NamedTuple):
    """Images, uint8 (N, 3, 32, 32), and labels, int64 (N,)."""

    images: Tensor
    labels: Tensor


class Images(NamedTuple):
    """Training images, the validation images held out of the training split, and test images."""

    train: Split
    validation: Split
    test: Split


def load(folder: Path, device: torch.device, fraction: float = 1.0) -> Images:
    """Read a fraction of `train.parquet` and of `test.parquet` (columns `img` and `label`) onto the device.

    Raises:
        FileNotFoundError: if a file is missing.
    """
    # The processes of the pool are forked: they import nothing, and use no GPU.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        train, test = (_read(folder / f"{name}.parquet", fraction, pool) for name in ("train", "test"))
    held_out = max(1, round(HELD_OUT * len(train.labels)))
    splits = Split(*(t[held_out:] for t in train)), Split(*(t[:held_out] for t in train)), test
    return Images(*(Split(images.to(device), labels.to(device)) for images, labels in splits))


def _read(path: Path, fraction: float, pool: ProcessPoolExecutor) -> Split:
    """A fraction of a file's images, in a fixed random order."""
    import pyarrow.parquet

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; allowed: a folder with train.parquet and test.parquet.")
    table = pyarrow.parquet.read_table(path)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    order = order[: max(1, round(fraction * len(table)))]
    encoded = table.column("img").combine_chunks().field("bytes").to_pylist()
    pixels = np.stack(list(pool.map(_decode, [encoded[i] for i in order.tolist()], chunksize=500)))
    labels = torch.from_numpy(table.column("label").to_numpy().astype(np.int64))
    return Split(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels[order])


def _decode(encoded: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def micro_batches(split: Split, size: int, block: int, seed: int) -> Iterator[Split]:
    """Yield augmented micro-batches without end, the same for every method: shuffled passes over the images.

    Args:
        split: training images.
        size: images of a micro-batch.
        block: micro-batches that are drawn at once.
        seed: of the order, the crops and the flips.
    """
    device = split.images.device
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64, device=device)
    while True:
        while len(order) < size * block:
            order = torch.cat([order, torch.randperm(len(split.labels), generator=generator, device=device)])
        chosen, order = order[: size * block], order[size * block :]
        images = random_flip(random_crop(split.images[chosen], PADDING, generator), generator)
        yield from map(Split, images.split(size), split.labels[chosen].split(size))
