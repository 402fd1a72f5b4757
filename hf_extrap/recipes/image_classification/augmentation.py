"""Augmentation of a batch of images on its device: random crop and flip (He et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """Random crop and flip of the `pixel_values` of a training batch.

    Attributes:
        crop: padding of the random crop in pixels; 0 disables it.
        flip: whether images are flipped at random.
    """

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
