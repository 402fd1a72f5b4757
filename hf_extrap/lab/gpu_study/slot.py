"""A model whose parameters are one flat tensor, and its forward and backward pass as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import Split

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
EVALUATION_BATCH = 2500


class Slot:
    """One model that trains on its own CUDA stream; several slots share a GPU.

    The model's parameters are views of `flat`, the only parameter of the optimizer: moving it takes a few kernels, not
    a few for each tensor. On a GPU a captured graph runs forward and backward at fixed addresses, in bfloat16 autocast
    and channels-last layout, and writes the gradient of the micro-batch; `flat.backward` then passes it to hooks and to
    `.grad`. Parameters and gradients are float32.

    Args:
        size: images of a micro-batch, over which BatchNorm takes its statistics.
        device: of the model.
        depth: of the ResNet, 6n + 2.
    """

    def __init__(self, size: int, device: torch.device, depth: int = 20) -> None:
        self.device, self._depth = device, depth
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self.active():
            self.model = _build(0, depth).to(device)
            self._tensors = list(self.model.parameters())
            self.flat = nn.Parameter(_flatten(self.model))
            for parameter, view in zip(self._tensors, self.layers_of(self.flat.detach()), strict=True):
                parameter.data = view
            self._gradient = torch.zeros_like(self.flat)
            self._gradients = self.layers_of(self._gradient)
            self.loss_sum = torch.zeros((), device=device)
            self._images = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, device=device)
            self._labels = torch.randint(10, (size,), device=device)
        self._graph = self._captured() if device.type == "cuda" else None

    def active(self) -> Any:
        """Context in which kernels go to this slot's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def layers_of(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor, one for each parameter tensor of the model."""
        parts = flat.split([p.numel() for p in self._tensors])
        return [_unflatten(part, p.shape) for part, p in zip(parts, self._tensors, strict=True)]

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Set the initial parameters of a seed, and clear the gradient."""
        self.flat.copy_(_flatten(_build(seed, self._depth)))
        self.flat.grad = None
        self.loss_sum.zero_()

    def backward(self, batch: Split, scale: float) -> None:
        """Forward and backward pass of the mean loss times `scale`, at the current values of `flat`."""
        self._images.copy_(batch.images)
        self._labels.copy_(batch.labels)
        if self._graph is None:
            self._pass()
        else:
            self._graph.replay()
        self.flat.backward(self._gradient * scale)

    @torch.no_grad()
    def correct(self, split: Split) -> Tensor:
        """Number of images that the model classifies correctly, with BatchNorm's running statistics; on the device."""
        self.model.eval()
        found = torch.zeros((), dtype=torch.int64, device=self.device)
        with self._precision():
            for images, labels in zip(*(t.split(EVALUATION_BATCH) for t in split), strict=True):
                found += (self.model(pixel_values=images).logits.argmax(-1) == labels).sum()
        self.model.train()
        return found

    @torch.no_grad()
    def recalibrate(self, images: Tensor) -> None:
        """Take BatchNorm's running statistics of one batch, at x: training gathers them at y."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with self._precision():
            self.model(pixel_values=images)
        for norm in norms:
            norm.momentum = 0.1

    @contextmanager
    def _precision(self) -> Iterator[None]:
        # A captured graph must cast the weights at every replay: no cache.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            yield

    def _pass(self) -> None:
        with self._precision():
            logits = self.model(pixel_values=self._images).logits
            loss = functional.cross_entropy(logits.float(), self._labels)
        torch._foreach_copy_(self._gradients, torch.autograd.grad(loss, self._tensors))
        self.loss_sum += loss.detach()

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Only here: the convolutions of an evaluation are too few for a search of algorithms.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with self.active():
                for _ in range(3):
                    self._pass()
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(graph, stream=self.stream):
                self._pass()
        torch.cuda.synchronize(self.device)
        return graph


def _build(seed: int, depth: int) -> nn.Module:
    from hf_extrap.recipes.models import ExtrapResNetConfig, ExtrapResNetForImageClassification

    fields: dict[str, Any] = {"num_labels": 10, "depth": depth}
    fields |= {"image_mean": MEAN, "image_std": DEVIATION}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ExtrapResNetForImageClassification(ExtrapResNetConfig(**fields)).train()


def _flatten(model: nn.Module) -> Tensor:
    """All parameters in one tensor, convolutions in channels-last order."""
    tensors = (p.detach() for p in model.parameters())
    return torch.cat([(t.permute(0, 2, 3, 1) if t.dim() == 4 else t).reshape(-1) for t in tensors])


def _unflatten(part: Tensor, shape: torch.Size) -> Tensor:
    """The view of one parameter tensor."""
    if len(shape) != 4:
        return part.view(shape)
    return part.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
