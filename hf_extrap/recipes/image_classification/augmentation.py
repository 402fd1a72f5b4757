"""Augmentation of whole batches of pictures, on whatever device they are on: random crop and flip (He et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Move each picture by up to `padding` pixels up, down and sideways; zeros come in at the edges.

    Args:
        images: (batch, channels, height, width), of any type.
        padding: pixels.
        generator: on the pictures' device.
    """
    height, width = images.shape[-2:]
    # (batch, channels, 2 padding + 1, 2 padding + 1, height, width): every crop there is, as a view.
    crops = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    corner = torch.randint(2 * padding + 1, (2, len(images)), generator=generator, device=images.device)
    return crops[torch.arange(len(images), device=images.device), :, corner[0], corner[1]]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each picture, (batch, channels, height, width), left to right with probability 1/2."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


@dataclass(frozen=True)
class Augmentation:
    """Crops and flips the `pixel_values` of a training batch.

    Attributes:
        crop: padding of the random crop in pixels; 0 for none.
        flip: whether pictures are mirrored at random.
    """

    crop: int
    flip: bool

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the batch with other `pixel_values`, drawn from the generator alone."""
        images = batch["pixel_values"]
        if self.crop:
            images = random_crop(images, self.crop, generator)
        if self.flip:
            images = random_flip(images, generator)
        return {**batch, "pixel_values": images}
