"""The ResNet for small images (He et al. 2016, section 4.2) as a `PreTrainedModel`: 6n + 2 layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, initialization
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

#: Block size of oneDNN in channels. With fewer channels in channels-last layout, its gradient of a strided 1 × 1
#: convolution writes out of bounds on CPUs with AVX2 (oneDNN issue 6035).
ONEDNN_BLOCK = 16
#: Auto class -> class in this file.
CLASSES = {
    "AutoConfig": "ExtrapResNetConfig",
    "AutoModelForImageClassification": "ExtrapResNetForImageClassification",
}


class ExtrapResNetConfig(ResNetConfig):
    """Configuration of a ResNet for small images, with the statistics that normalize them.

    Args:
        depth: layers with weights, 6n + 2: three stages of n basic blocks (8, 14, 20, 32, …).
        width: channels of the first stage; the second has twice, the third four times as many.
        image_mean: mean of each channel over the training set, of values in [0, 1].
        image_std: standard deviation of each channel, likewise.
    """

    model_type = "extrap_resnet"

    depth: int = 20
    width: int = 16
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(f"`depth` is {self.depth}; allowed: 6n + 2, such as 8, 14, 20 or 32.")
        if self.width < 1:
            raise ValueError(f"`width` is {self.width}; allowed: at least 1.")
        if not len(self.image_mean) == len(self.image_std) == self.num_channels or min(self.image_std) <= 0:
            raise ValueError(
                f"`image_mean` is {self.image_mean} and `image_std` {self.image_std}; allowed: {self.num_channels} "
                "numbers each, one a channel, and positive deviations."
            )
        self.layer_type = "basic"
        self.embedding_size = self.width
        self.hidden_sizes = [self.width, 2 * self.width, 4 * self.width]
        self.depths = [(self.depth - 2) // 6] * 3
        super().__post_init__(**kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the configuration with the code of the model, for environments without this package."""
        # Of all classes: Transformers would name only the saved one, and after FSDP's renaming a wrong one.
        self.auto_map = {auto_class: f"{__name__.rpartition('.')[2]}.{name}" for auto_class, name in CLASSES.items()}
        super().save_pretrained(*args, **kwargs)


class Normalization(nn.Module):
    """Normalizes uint8 images on their device; images of floats are already normalized."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ExtrapResNetConfig) -> None:
        super().__init__()
        self.config = config
        # Saved in the configuration.
        self.register_buffer("mean", torch.empty(config.num_channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(config.num_channels, 1, 1), persistent=False)

    def fill_buffers(self) -> None:
        """Set mean and deviation, of values in [0, 255], from the configuration."""
        for buffer, values in ((self.mean, self.config.image_mean), (self.std, self.config.image_std)):
            initialization.copy_(buffer, 255 * torch.tensor(values).view(-1, 1, 1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to floats of the same shape."""
        return (pixel_values - self.mean) / self.std if pixel_values.dtype == torch.uint8 else pixel_values


class ExtrapResNetForImageClassification(ResNetForImageClassification):
    """Three stages of basic blocks at full, half and quarter resolution, average pooling, one linear layer.

    272,474 parameters at depth 20, width 16 and 10 classes. A block that widens has a 1 × 1 convolution as its shortcut
    (option B of the paper, which uses option A on CIFAR-10).

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    config_class = ExtrapResNetConfig
    # The loss ignores num_items_in_batch: the Trainer must divide by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: ExtrapResNetConfig) -> None:
        super().__init__(config)
        self.normalization = Normalization(config)
        stem = ResNetConvLayer(config.num_channels, config.embedding_size, kernel_size=3)
        self.resnet.add_module("embedder", stem)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Normalization):
            module.fill_buffers()
        else:
            super()._init_weights(module)

    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify images; ValueError if `pixel_values` is missing or has another shape.

        Args:
            pixel_values: (batch, channels, height, width), uint8, or floats that are already normalized.
            labels: (batch,), for the loss, the mean cross entropy in nats.
        """
        channels = self.config.num_channels
        if pixel_values is None or pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(f"`pixel_values` has the shape {shape}; allowed: (batch, {channels}, height, width).")
        pixel_values = self.normalization(pixel_values).to(self.dtype)
        if self.config.width >= ONEDNN_BLOCK:
            # Channels last, the fastest layout of convolutions on a CPU; torch.vmap does not support memory formats.
            pixel_values = pixel_values.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return super().forward(pixel_values=pixel_values, labels=labels, **kwargs)


# A saved configuration, and so a saved model, carries this file.
ExtrapResNetConfig.register_for_auto_class()
