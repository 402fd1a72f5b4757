"""The image classification task: splits, decoding, augmentation, accuracy, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EvalPrediction, TrainingArguments

from hf_extrap.recipes import get_task
from hf_extrap.recipes.image_classification.images import (
    Augmentation,
    ImageDataset,
    builtin_digits,
    collate,
    random_crop,
    random_flip,
    stratified_cut,
)
from hf_extrap.recipes.image_classification.task import ImageClassificationArguments, accuracy, most_likely
from hf_extrap.recipes.task import PreparedTask

TINY = {"depth": 8, "width": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def prepare(cache: Path, **fields: Any) -> PreparedTask:
    arguments = ImageClassificationArguments(**{"data_cache_dir": str(cache), **TINY, **fields})
    return get_task("image_classification").prepare(arguments, TrainingArguments(str(cache / "out"), use_cpu=True))


def rows(images: np.ndarray, labels: list[int]) -> datasets.Dataset:
    columns = {"img": [Image.fromarray(image) for image in images], "label": labels}
    names = [f"class {i}" for i in range(max(labels) + 1)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict(columns, features=features)


def write(folder: Path, count: int = 40, size: int = 6, **parts: datasets.Dataset) -> Path:
    folder.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for name in ("train", "test"):
        part = parts.get(name, rows(images, [i % 4 for i in range(count)]))
        part.to_parquet(folder / f"{name}.parquet")
    return folder


def test_digits_are_split_evenly_and_normalized(cache: Path) -> None:
    prepared = prepare(cache)
    parts = [prepared.train_dataset, prepared.eval_dataset, prepared.test_dataset]
    assert [len(part) for part in parts] == [1140, 297, 360]
    for part in parts:
        assert part.images.shape[1:] == (3, 8, 8)
        counts = np.bincount(part.labels)
        assert len(counts) == 10 and counts.max() - counts.min() <= 0.05 * len(part)
    indices = [builtin_digits()[name]["label"] for name in ("train", "validation", "test")]
    assert [list(part.labels) for part in parts] == indices
    assert prepared.augment is None
    assert prepared.model.config.id2label[9] == "9"
    assert prepared.facts["dataset"] == "scikit-learn digits"
    (kept, cut), (_, again) = (stratified_cut(builtin_digits()["train"], 100, "label") for _ in range(2))
    assert cut["label"] == again["label"] and len(kept) == 1040 and len(cut) == 100
    seen = prepared.model.normalization(torch.from_numpy(np.array(prepared.train_dataset.images)))
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    assert list(prepared.processing_class.image_mean) == list(prepared.model.config.image_mean)


def test_images_are_those_of_the_files_and_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data")
    expected = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    prepared = prepare(tmp_path, data_dir=str(folder), validation_samples=8)
    np.testing.assert_array_equal(prepared.test_dataset.images, expected.transpose(0, 3, 1, 2))
    assert (len(prepared.train_dataset), len(prepared.eval_dataset)) == (32, 8)
    assert np.bincount(prepared.eval_dataset.labels).tolist() == [2, 2, 2, 2]
    both = np.concatenate([prepared.train_dataset.images, prepared.eval_dataset.images]).reshape(40, -1)
    assert len(np.unique(both, axis=0)) == 40
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded again"))
    again = prepare(tmp_path, data_dir=str(folder), validation_samples=8)
    np.testing.assert_array_equal(again.train_dataset.images, prepared.train_dataset.images)
    with pytest.raises(pytest.fail.Exception):
        prepare(tmp_path, data_dir=str(folder), validation_samples=12)


def test_batches_and_accuracy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 5, 5), dtype=np.uint8)
    part = ImageDataset(images, np.arange(9))
    whole, collated = collate(part.__getitems__([7, 2, 2])), collate([part[7], part[2], part[2]])
    for name in ("pixel_values", "labels"):
        assert whole[name].dtype == collated[name].dtype and torch.equal(whole[name], collated[name])
    assert whole["labels"].tolist() == [7, 2, 2]
    labels = torch.tensor([1, 0, 0, 0])
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    assert accuracy(EvalPrediction(most_likely(logits, labels).numpy(), labels.numpy())) == {"accuracy": 75.0}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_crop_is_the_image_moved_with_zeros_at_its_edges(dtype: torch.dtype) -> None:
    images = torch.randint(1, 256, (400, 3, 6, 7)).to(dtype)
    moved = random_crop(images, 2, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.dtype == dtype
    found = set()
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, whole in zip(moved, padded, strict=True):
        places = [(t, s) for t in range(5) for s in range(5) if torch.equal(image, whole[:, t : t + 6, s : s + 7])]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) == 25


def test_flips_and_the_augmentation_of_a_generator() -> None:
    images = torch.rand(1000, 1, 2, 3)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (mirrored | (flipped == images).flatten(1).all(1)).all()
    assert 450 < int(mirrored.sum()) < 550
    batch = {"pixel_values": torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), "labels": torch.arange(8)}
    augment = Augmentation(crop=2, flip=True)
    first, again, other = (augment(batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    assert first["labels"] is batch["labels"]
    assert ImageClassificationArguments(dataset="uoft-cs/cifar10").augmentation == Augmentation(4, True)
    assert ImageClassificationArguments(random_flip=True).augmentation == Augmentation(0, True)
    none = ImageClassificationArguments(dataset="uoft-cs/cifar10", random_crop=0, random_flip=False)
    assert none.augmentation is None


def test_other_models_are_refused(tmp_path: Path, cache: Path) -> None:
    prepare(cache).model.save_pretrained(tmp_path / "ours")
    assert prepare(cache, model=str(tmp_path / "ours")).model.num_labels == 10
    with pytest.raises(ValueError, match="has 10 classes, the data 4"):
        prepare(cache, model=str(tmp_path / "ours"), data_dir=str(write(tmp_path / "data")), validation_samples=8)
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        prepare(cache, model=str(tmp_path / "missing"))


def test_a_subset_of_sorted_rows_has_every_class(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 6, 6, 3), dtype=np.uint8)
    ordered = rows(images, [i // 50 for i in range(200)])
    folder = write(tmp_path / "data", train=ordered, test=ordered)
    counts = {"max_train_samples": 60, "max_eval_samples": 30, "validation_samples": 40}
    prepared = prepare(tmp_path, data_dir=str(folder), **counts)
    for part, size in ((prepared.train_dataset, 60), (prepared.eval_dataset, 30), (prepared.test_dataset, 30)):
        assert len(part) == size and len(np.unique(part.labels)) == 4


def test_unusable_data_is_refused(tmp_path: Path) -> None:
    larger = rows(np.zeros((8, 7, 7, 3), dtype=np.uint8), [0, 1, 2, 3] * 2)
    fifth = rows(np.zeros((1, 6, 6, 3), dtype=np.uint8), [4])
    for test, fields, message in (
        (None, {"validation_samples": 99}, "99 rows cannot be cut off a training split of 40"),
        (None, {"image_column": "image"}, "'image'"),
        (None, {"image_column": "label"}, "allowed: the feature Image"),
        (larger, {}, "differ in size"),
        (fifth, {}, "class 4"),
        (None, {"random_crop": 6}, "`random_crop` is 6; allowed: less than the images' 6 x 6 pixels"),
    ):
        folder = write(tmp_path / "data", **({} if test is None else {"test": test}))
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path, data_dir=str(folder), **{"validation_samples": 8, **fields})
    with pytest.raises(ValueError, match="`depth`"):
        ImageClassificationArguments(depth=10)
