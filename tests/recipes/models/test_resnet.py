"""The ResNet for small images: size, normalization, saving, pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_extrap.recipes.models import ExtrapResNetConfig, ExtrapResNetForImageClassification

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def resnet(**fields: Any) -> ExtrapResNetForImageClassification:
    torch.manual_seed(0)
    sizes = {"depth": 8, "width": 4, "num_labels": 10, "image_mean": MEAN, "image_std": STD, **fields}
    return ExtrapResNetForImageClassification(ExtrapResNetConfig(**sizes)).eval()


def random_images(count: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalized(images: torch.Tensor) -> torch.Tensor:
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_resnet_20_is_that_of_he_et_al() -> None:
    model = resnet(depth=20, width=16)
    assert model.num_parameters() == 272_474
    names = [name for name, p in model.named_parameters() if p.dim() > 1 and "shortcut" not in name]
    assert len(names) == 20
    shapes = [tuple(h.shape) for h in resnet()(random_images(), output_hidden_states=True).hidden_states]
    assert shapes == [(4, 4, 32, 32), (4, 4, 32, 32), (4, 8, 16, 16), (4, 16, 8, 8)]
    weight = resnet(width=64).resnet.encoder.stages[1].layers[0].layer[1].convolution.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.01)


def test_normalization_loss_and_gradients() -> None:
    model, images = resnet(), random_images()
    torch.testing.assert_close(model(images).logits, model(normalized(images)).logits)
    assert not torch.allclose(model(images).logits, model(images.float()).logits)
    model, labels = resnet(), torch.tensor([0, 3, 9, 1])
    output = model(random_images(), labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits, labels)
    assert output.loss.item() == pytest.approx(expected.item())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.accepts_loss_kwargs is False


def test_a_saved_model_is_the_same_and_a_pipeline_takes_images(tmp_path: Path) -> None:
    model = resnet()
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, ExtrapResNetForImageClassification)
    expected = model(random_images()).logits
    assert torch.equal(loaded(random_images()).logits, expected)
    classify = pipeline("image-classification", str(tmp_path))
    found = classify(Image.fromarray(random_images()[0].permute(1, 2, 0).numpy()), top_k=1)[0]
    assert found["label"] == f"LABEL_{int(expected[0].argmax())}"
    assert found["score"] == pytest.approx(float(expected[0].softmax(-1).max()), rel=1e-4)


@pytest.mark.parametrize("name, value", [("depth", 18), ("width", 0), ("image_std", [1, 0, 1]), ("image_mean", [0.5])])
def test_wrong_shapes_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        resnet(**{name: value})
    with pytest.raises(ValueError, match="allowed"):
        resnet()(random_images()[:, :1])
