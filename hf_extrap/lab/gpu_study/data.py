"""CIFAR-10 as uint8 tensors on the device: parquet files decoded once, crops and flips drawn on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .decoding import decode

PADDING = 4
HELD_OUT = 0.1
"""Share of the training split that is held out for validation."""


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
    """Read `train.parquet` and `test.parquet` (columns `img` and `label`).

    Args:
        folder: where they are.
        device: where the tensors go.
        fraction: share of each split that is used.

    Raises:
        FileNotFoundError: if a file is missing.
    """
    train, test = (_read(folder / f"{name}.parquet", fraction) for name in ("train", "test"))
    held_out = max(1, round(HELD_OUT * len(train.labels)))
    splits = (Split(*(t[held_out:] for t in train)), Split(*(t[:held_out] for t in train)), test)
    return Images(*(Split(s.images.to(device), s.labels.to(device)) for s in splits))


def _read(path: Path, fraction: float) -> Split:
    """A share of the images of a file, in a random order that is always the same."""
    import pyarrow.parquet

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    table = pyarrow.parquet.read_table(path)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    order = order[: max(1, round(fraction * len(table)))]
    encoded = table.column("img").combine_chunks().field("bytes").to_pylist()
    pixels = torch.from_numpy(decode([encoded[i] for i in order.tolist()]))
    labels = torch.from_numpy(table.column("label").to_numpy().astype(np.int64))
    return Split(pixels.permute(0, 3, 1, 2).contiguous(), labels[order])


def micro_batches(split: Split, size: int, block: int, seed: int) -> Iterator[Split]:
    """Endless augmented micro-batches, the same for every method: one shuffled pass over the images after another.

    Args:
        split: training images.
        size: images of a micro-batch.
        block: micro-batches that are drawn at once.
        seed: of the order, the crops and the flips.
    """
    device = split.images.device
    generator = torch.Generator(device).manual_seed(seed)
    padded = torch.nn.functional.pad(split.images, (PADDING,) * 4)
    order = torch.empty(0, dtype=torch.int64, device=device)
    while True:
        while len(order) < size * block:
            order = torch.cat([order, torch.randperm(len(split.labels), generator=generator, device=device)])
        chosen, order = order[: size * block], order[size * block :]
        images = _crop(padded, chosen, generator)
        yield from map(Split, images.split(size), split.labels[chosen].split(size))


def _crop(padded: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the original size, half of them flipped."""
    device, side = padded.device, padded.shape[-1] - 2 * PADDING
    corner = torch.randint(2 * PADDING + 1, (2, len(chosen), 1), generator=generator, device=device)
    flip = torch.randint(2, (len(chosen), 1), generator=generator, device=device).bool()
    along = torch.arange(side, device=device)
    rows = corner[0] + along
    columns = corner[1] + torch.where(flip, side - 1 - along, along)
    channels = torch.arange(padded.shape[1], device=device)
    return padded[chosen[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None]]
