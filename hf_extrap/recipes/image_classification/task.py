"""Image classification: labelled images, a ResNet for small images, augmentation and accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
from torch import Tensor
from transformers import AutoModelForImageClassification, EvalPrediction, TrainingArguments

from hf_extrap.recipes.data import DataArguments, load_pretrained, load_splits
from hf_extrap.recipes.image_classification.images import (
    Augmentation,
    ImageDataset,
    builtin_digits,
    collate,
    decode,
    random_rows,
    stratified_cut,
)
from hf_extrap.recipes.models import ExtrapResNetConfig, ExtrapResNetForImageClassification
from hf_extrap.recipes.task import PreparedTask, check_fields, parameter_count
from hf_extrap.training.arguments import described
from hf_extrap.training.extras import extra


@dataclass
class ImageClassificationArguments(DataArguments):
    """Fields of the task `image_classification`: columns, augmentation, and a new model."""

    image_column: str = described("img", "Column of the images.")
    label_column: str = described("label", "Column of the classes, numbered from 0.")
    validation_samples: int = described(
        5000, "Rows split off train for validation, if the data has no validation split."
    )
    random_crop: int | None = described(None, "Padding of the random crop in pixels; default: 4, and 0 for 'builtin'.")
    random_flip: bool | None = described(
        None, "Flip images horizontally at random; default: true, and false for 'builtin'."
    )
    depth: int = described(20, "Layers of a new ResNet: 6n + 2, such as 8 or 20.")
    width: int = described(16, "Channels of the first stage of a new ResNet.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            validation_samples=(self.validation_samples >= 1, "at least 1"),
            random_crop=(self.random_crop is None or self.random_crop >= 0, "at least 0"),
        )
        # The model's own check, before any data is read.
        ExtrapResNetConfig(depth=self.depth, width=self.width)

    @property
    def is_builtin(self) -> bool:
        """Whether the data are scikit-learn's digits."""
        return self.data_dir is None and self.dataset == "builtin"

    @property
    def augmentation(self) -> Augmentation | None:
        """The augmentation of training images; by default digits have none."""
        crop = self.random_crop if self.random_crop is not None else 0 if self.is_builtin else 4
        flip = self.random_flip if self.random_flip is not None else not self.is_builtin
        return Augmentation(crop, flip) if crop or flip else None


class ImageClassificationTask:
    """Trains a ResNet on small images and measures its accuracy."""

    name: ClassVar[str] = "image_classification"
    arguments_class: ClassVar[type] = ImageClassificationArguments
    seq2seq: ClassVar[bool] = False

    def training_defaults(self) -> dict[str, Any]:
        """Return the ResNet paper's SGD: Nesterov momentum and weight decay, without clipping."""
        return {
            "optim": "sgd",
            "sgd_momentum": 0.9,
            "sgd_nesterov": True,
            "weight_decay": 1e-4,
            "learning_rate": 0.1,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 128,
            "per_device_eval_batch_size": 500,
            "remove_unused_columns": False,
            "metric_for_best_model": "accuracy",
        }

    def prepare(self, arguments: ImageClassificationArguments, training_arguments: TrainingArguments) -> PreparedTask:
        """Load and decode the images (main process first), and build the model."""
        with extra("recipes"):
            from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        with training_arguments.main_process_first(desc="image data"):
            splits = load_splits(
                arguments,
                columns=(arguments.image_column, arguments.label_column),
                builtin=builtin_digits,
                cut_validation=lambda rows: stratified_cut(rows, arguments.validation_samples, arguments.label_column),
                take=random_rows,
            )
            images = decode(splits, arguments.cache_root, arguments.image_column, arguments.label_column)
        names = class_names(splits["train"], images, arguments.label_column)
        model = build_model(arguments, images["train"], names)
        height, width = images["train"].images.shape[2:]
        augmentation = arguments.augmentation
        if augmentation and augmentation.crop >= min(height, width):
            raise ValueError(
                f"`random_crop` is {augmentation.crop}; allowed: less than the images' {height} x {width} pixels, or a "
                "crop would hold nothing but padding."
            )
        return PreparedTask(
            model=model,
            processing_class=ViTImageProcessorPil(
                size={"height": height, "width": width},
                image_mean=list(model.config.image_mean),
                image_std=list(model.config.image_std),
            ),
            train_dataset=images["train"],
            eval_dataset=images["validation"],
            test_dataset=images["test"],
            data_collator=collate,
            metric="accuracy",
            greater_is_better=True,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=most_likely,
            augment=augmentation,
            samples_per_epoch=len(images["train"]),
            facts={
                "dataset": "scikit-learn digits" if arguments.is_builtin else arguments.data_dir or arguments.dataset,
                **{f"{name}_images": len(part) for name, part in images.items()},
                "image_size": f"{height} × {width}",
                "classes": len(names),
                "random_crop": augmentation.crop if augmentation else 0,
                "random_flip": augmentation.flip if augmentation else False,
                "parameters": parameter_count(model),
            },
        )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Percentage of images whose most likely class is right."""
    return {"accuracy": 100 * float(np.equal(prediction.label_ids, prediction.predictions).mean())}


def most_likely(logits: Tensor, labels: Tensor) -> Tensor:
    """Map logits (batch, classes) to the most likely class (batch,), so that no logits are gathered."""
    return logits.argmax(-1)


def class_names(train: datasets.Dataset, images: dict[str, ImageDataset], label_column: str) -> list[str]:
    """Names of the classes, by default their numbers; ValueError if a split has a class that train has not."""
    count = int(images["train"].labels.max()) + 1
    names = list(getattr(train.features[label_column], "names", None) or map(str, range(count)))
    for name, part in images.items():
        if part.labels.max() >= len(names):
            raise ValueError(
                f"split {name!r} has class {part.labels.max()}; allowed: 0 to {len(names) - 1}, as in train."
            )
    return names


def build_model(
    arguments: ImageClassificationArguments, train: ImageDataset, names: list[str]
) -> ExtrapResNetForImageClassification:
    """Load the model that the arguments name, or build a ResNet that normalizes by the statistics of train.

    Raises:
        FileNotFoundError: if `model` is neither a folder with a model nor found on the Hub.
        ValueError: if `model` has another architecture or number of classes.
    """
    if arguments.model is None:
        mean, std = train.channel_moments()
        return ExtrapResNetForImageClassification(
            ExtrapResNetConfig(
                depth=arguments.depth,
                width=arguments.width,
                image_mean=mean,
                # A constant channel is centered, not scaled.
                image_std=[deviation or 1.0 for deviation in std],
                id2label=dict(enumerate(names)),
                label2id={name: number for number, name in enumerate(names)},
            )
        )
    model = load_pretrained(AutoModelForImageClassification, arguments.model)
    if not isinstance(model, ExtrapResNetForImageClassification):
        raise ValueError(
            f"model {arguments.model!r} is a {type(model).__name__}; allowed: an ExtrapResNetForImageClassification, "
            "which normalizes images itself."
        )
    if model.config.num_labels != len(names):
        raise ValueError(f"model {arguments.model!r} has {model.config.num_labels} classes, the data {len(names)}.")
    return model
