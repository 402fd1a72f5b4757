"""A toy ResNet on random images and its Trainer, shared by tests and by the processes they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_extrap import ExtrapTrainer
from hf_extrap.recipes.image_classification.images import Augmentation, ImageDataset, collate
from hf_extrap.recipes.models import ExtrapResNetConfig, ExtrapResNetForImageClassification
from tests.support.tiny_trainer import arguments


class Watched(ExtrapTrainer):
    """Records the images of every training pass."""

    seen: list[Tensor] | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training and self.seen is not None:
            self.seen.append(inputs["pixel_values"].clone())
        return super().compute_loss(model, inputs, *args, **kwargs)


def random_images(count: int) -> ImageDataset:
    """Random images of 8 × 8 pixels, brighter for higher classes."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 4, count)
    images = draw.integers(0, 64, (count, 3, 8, 8)) + 60 * labels.reshape(-1, 1, 1, 1)
    return ImageDataset(images.astype(np.uint8), labels)


def train_images(
    folder: Path | str, resume: Any = None, seen: list[Tensor] | None = None, **fields: Any
) -> ExtrapTrainer:
    """Train the toy ResNet on cropped and flipped images, in their order."""
    torch.manual_seed(0)
    model = ExtrapResNetForImageClassification(ExtrapResNetConfig(depth=8, width=4, num_labels=4))
    fields = {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "sgd_momentum": 0.9} | fields
    data: dict[str, Any] = {
        "train_dataset": random_images(64),
        "eval_dataset": random_images(16),
        "data_collator": collate,
    }
    trainer = Watched(model, arguments(folder, **fields), **data)
    trainer.seen = seen
    trainer.augment = Augmentation(crop=1, flip=True)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def buffers(model: torch.nn.Module) -> Tensor:
    """All buffers as one vector."""
    return torch.cat([b.detach().reshape(-1).float() for b in model.buffers()])
