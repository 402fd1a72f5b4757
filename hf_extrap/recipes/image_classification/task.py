"""Image classification: labelled pictures in; a ResNet for small pictures, augmentation and accuracy out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
from sklearn.metrics import accuracy_score
from torch import Tensor
from transformers import AutoModelForImageClassification, EvalPrediction, TrainingArguments
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_extrap.recipes.image_classification.augmentation import Augmentation
from hf_extrap.recipes.image_classification.images import (
    Pictures,
    builtin_digits,
    collate,
    decoded,
    random_rows,
    stratified_cut,
)
from hf_extrap.recipes.models import ExtrapResNetConfig, ExtrapResNetForImageClassification
from hf_extrap.recipes.task import DataArguments, PreparedTask, load_splits, parameter_count


@dataclass
class ImageClassificationArguments(DataArguments):
    """Fields of the image classification task: columns, augmentation, and the model if it is made here.

    Raises:
        ValueError: If a field has a value that is not allowed.
    """

    image_column: str = field(default="img", metadata={"help": "Column of the pictures."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes, numbered from 0."})
    validation_samples: int = field(
        default=5000, metadata={"help": "Rows cut off train where the data has no validation split."}
    )
    random_crop: int | None = field(
        default=None, metadata={"help": "Padding of the random crop in pixels; default: 4, and 0 for 'builtin'."}
    )
    random_flip: bool | None = field(
        default=None, metadata={"help": "Mirror pictures at random; default: true, and false for 'builtin'."}
    )
    depth: int = field(default=20, metadata={"help": "Layers of the ResNet made here: 6n + 2, such as 8 or 20."})
    width: int = field(default=16, metadata={"help": "Channels of its first stage."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_samples < 1:
            raise ValueError(f"`validation_samples` is {self.validation_samples}: it must be at least 1.")
        if self.random_crop is not None and self.random_crop < 0:
            raise ValueError(f"`random_crop` is {self.random_crop}: it must be at least 0, for none.")
        # The model's own check, before any data is read.
        ExtrapResNetConfig(depth=self.depth, width=self.width)

    @property
    def is_builtin(self) -> bool:
        """Whether the data are the digits that come with scikit-learn."""
        return self.data_dir is None and self.dataset == "builtin"

    @property
    def augmentation(self) -> Augmentation | None:
        """What is done to training pictures; digits are neither cropped nor mirrored unless a field says so."""
        crop = self.random_crop if self.random_crop is not None else 0 if self.is_builtin else 4
        flip = self.random_flip if self.random_flip is not None else not self.is_builtin
        return Augmentation(crop, flip) if crop or flip else None


class ImageClassificationTask:
    """Trains a ResNet on small pictures and measures its accuracy."""

    name: ClassVar[str] = "image_classification"
    arguments_class: ClassVar[type] = ImageClassificationArguments
    seq2seq: ClassVar[bool] = False

    def training_defaults(self) -> dict[str, Any]:
        """Return SGD with Nesterov's momentum and weight decay, unclipped, as the ResNets were trained."""
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
        """Load and decode the pictures (main process first), and build the model.

        Raises:
            FileNotFoundError: If data or model is missing.
            ValueError: If the data or the model cannot be used.
        """
        with training_arguments.main_process_first(desc="image data"):
            splits = load_splits(
                arguments,
                columns=(arguments.image_column, arguments.label_column),
                builtin=builtin_digits,
                cut_validation=lambda rows: stratified_cut(rows, arguments.validation_samples, arguments.label_column),
                take=random_rows,
            )
            pictures = decoded(splits, arguments.cache_root, arguments.image_column, arguments.label_column)
        names = class_names(splits["train"], pictures, arguments.label_column)
        model = build_model(arguments, pictures["train"], names)
        height, width = pictures["train"].images.shape[2:]
        augmentation = arguments.augmentation
        return PreparedTask(
            model=model,
            processing_class=ViTImageProcessorPil(
                size={"height": height, "width": width},
                image_mean=list(model.config.image_mean),
                image_std=list(model.config.image_std),
            ),
            train_dataset=pictures["train"],
            eval_dataset=pictures["validation"],
            test_dataset=pictures["test"],
            data_collator=collate,
            metric="accuracy",
            greater_is_better=True,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=most_likely,
            augment=augmentation,
            samples_per_epoch=len(pictures["train"]),
            facts={
                "dataset": "scikit-learn digits" if arguments.is_builtin else arguments.data_dir or arguments.dataset,
                **{f"{name}_pictures": len(part) for name, part in pictures.items()},
                "picture_size": f"{height} × {width}",
                "classes": len(names),
                "random_crop": augmentation.crop if augmentation else 0,
                "random_flip": augmentation.flip if augmentation else False,
                "parameters": parameter_count(model),
            },
        )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the pictures whose most likely class is right, in percent."""
    return {"accuracy": 100 * float(accuracy_score(prediction.label_ids, prediction.predictions))}


def most_likely(logits: Tensor, labels: Tensor) -> Tensor:
    """The class of each picture, (batch,), of logits (batch, classes): all that the metric needs."""
    return logits.argmax(-1)


def class_names(train: datasets.Dataset, pictures: dict[str, Pictures], label_column: str) -> list[str]:
    """Names of the classes by their number; the numbers themselves where the data gives none.

    Raises:
        ValueError: If a split has a class that train does not know.
    """
    feature = train.features[label_column]
    numbers = range(int(pictures["train"].labels.max()) + 1)
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else [str(number) for number in numbers]
    for name, part in pictures.items():
        if part.labels.max() >= len(names):
            raise ValueError(f"split {name!r} has class {part.labels.max()}, but train has only {len(names)} classes.")
    return names


def build_model(
    arguments: ImageClassificationArguments, train: Pictures, names: list[str]
) -> ExtrapResNetForImageClassification:
    """Return the model that the arguments name, or a ResNet made from them, normalised by the training pictures.

    Raises:
        FileNotFoundError: If `model` is neither a folder with a model nor found on the Hub.
        ValueError: If `model` is of another kind or has another number of classes.
    """
    if arguments.model is None:
        mean, std = train.channel_moments()
        return ExtrapResNetForImageClassification(
            ExtrapResNetConfig(
                depth=arguments.depth,
                width=arguments.width,
                image_mean=mean,
                # A channel that never changes is centred and left at that.
                image_std=[deviation or 1.0 for deviation in std],
                id2label=dict(enumerate(names)),
                label2id={name: number for number, name in enumerate(names)},
            )
        )
    try:
        model = AutoModelForImageClassification.from_pretrained(arguments.model)
    except OSError as error:
        raise FileNotFoundError(f"model {arguments.model!r} cannot be loaded: {error}") from error
    if not isinstance(model, ExtrapResNetForImageClassification):
        raise ValueError(
            f"model {arguments.model!r} is a {type(model).__name__}: it must be one of this package "
            f"({ExtrapResNetConfig.model_type}), which normalises pictures itself."
        )
    if model.config.num_labels != len(names):
        raise ValueError(f"model {arguments.model!r} has {model.config.num_labels} classes, the data {len(names)}.")
    return model


__all__ = ["ImageClassificationArguments", "ImageClassificationTask", "accuracy", "build_model", "most_likely"]
