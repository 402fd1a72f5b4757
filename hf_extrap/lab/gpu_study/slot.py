"""A model whose parameters are one flat tensor, and its forward and backward pass as a CUDA graph."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import Split

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
EVALUATED_AT_ONCE = 2500


class Slot:
    """Trains one model on a stream of its own; several slots share a GPU.

    The parameters of the model are views into `flat`, the one parameter that the optimizer has: moving it costs a few
    kernels instead of some for each tensor. A captured graph runs forward and backward at fixed addresses and leaves
    the micro-batch's gradient in `gradient`; `flat.backward` then passes it to hooks and to `.grad`.
    Parameters and gradients are float32; on a GPU passes are in bfloat16 autocast, channels last.

    Args:
        size: images of a micro-batch, over which BatchNorm takes its statistics.
        device: where it trains.
        depth: of the ResNet, 6n + 2.
        width: channels of its first stage.
        graph: capture the pass, on a GPU; without, every pass is launched kernel by kernel.
    """

    def __init__(self, size: int, device: torch.device, depth: int = 20, width: int = 16, graph: bool = True) -> None:
        self.device, self._build = device, partial(_build, depth, width)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self.active():
            self.model = self._build(0).to(device)
            self._modules = list(self.model.parameters())
            self.flat = nn.Parameter(torch.cat([_in_memory_order(p) for p in self._modules]).detach())
            self.layers = self._views(self.flat.detach())
            for parameter, view in zip(self._modules, self.layers, strict=True):
                parameter.data = view
            self.gradient = torch.zeros_like(self.flat)
            self._gradients = self._views(self.gradient)
            self.loss_sum = torch.zeros((), device=device)
            self._images = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, device=device)
            self._labels = torch.randint(10, (size,), device=device)
        self._starts: dict[int, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        if graph and device.type == "cuda":
            self._capture()

    def active(self) -> Any:
        """Context in which kernels go to this slot's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def layers_of(self, flat: Tensor) -> list[Tensor]:
        """One view of a flat tensor for each parameter tensor of the model."""
        return self._views(flat)

    def reset(self, seed: int) -> None:
        """Initial parameters of a seed, and no gradient."""
        if seed not in self._starts:
            parts = [_in_memory_order(p) for p in self._build(seed).parameters()]
            self._starts[seed] = torch.cat(parts).detach().to(self.device)
        with torch.no_grad():
            self.flat.copy_(self._starts[seed])
        self.flat.grad = None
        self.loss_sum.zero_()

    def backward(self, batch: Split, scale: float) -> None:
        """Forward and backward pass of the mean loss times `scale`, at the values that `flat` has now."""
        self._images.copy_(batch.images)
        self._labels.copy_(batch.labels)
        if self._graph is None:
            self._pass()
        else:
            self._graph.replay()
        self.flat.backward(self.gradient * scale)

    @torch.no_grad()
    def correct(self, split: Split) -> Tensor:
        """How many images the model classifies right, with running statistics of BatchNorm; stays on the device."""
        self.model.eval()
        found = torch.zeros((), dtype=torch.int64, device=self.device)
        parts = zip(split.images.split(EVALUATED_AT_ONCE), split.labels.split(EVALUATED_AT_ONCE), strict=True)
        for images, labels in parts:
            with self._precision():
                found += (self.model(pixel_values=images).logits.argmax(-1) == labels).sum()
        self.model.train()
        return found

    @torch.no_grad()
    def recalibrate(self, images: Tensor) -> None:
        """Running statistics of BatchNorm from these images in one batch, at x: those of training are gathered at y."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with self._precision():
            self.model(pixel_values=images)
        for norm in norms:
            norm.momentum = 0.1

    def fetch(self, value: Tensor) -> Generator[int, None, list[float]]:
        """Copy a vector to the host and yield 0 until it is there; returns its elements."""
        if self.stream is None:
            return list(value.tolist())
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self.stream)
        while not event.query():
            yield 0
        return list(host.tolist())

    @contextmanager
    def _precision(self) -> Iterator[None]:
        # A captured graph must cast the weights at every replay: no cache.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            yield

    def _pass(self) -> None:
        with self._precision():
            logits = self.model(pixel_values=self._images).logits
            loss = functional.cross_entropy(logits.float(), self._labels)
        torch._foreach_copy_(self._gradients, torch.autograd.grad(loss, self._modules))
        self.loss_sum += loss.detach()

    def _capture(self) -> None:
        # Only here: the convolutions of an evaluation are too few to be worth a search.
        with self.active(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            for _ in range(3):
                self._pass()
        torch.cuda.synchronize(self.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with torch.cuda.graph(self._graph, stream=self.stream):
                self._pass()
        torch.cuda.synchronize(self.device)

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self._modules])
        return [_shaped(part, p.shape) for part, p in zip(parts, self._modules, strict=True)]


def _build(depth: int, width: int, seed: int) -> nn.Module:
    from hf_extrap.recipes.image_classification.resnet import ExtrapResNetConfig, ExtrapResNetForImageClassification

    fields: dict[str, Any] = {"num_labels": 10, "depth": depth, "width": width}
    fields |= {"image_mean": MEAN, "image_std": DEVIATION}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ExtrapResNetForImageClassification(ExtrapResNetConfig(**fields))
    model.train()
    return model


def _in_memory_order(tensor: Tensor) -> Tensor:
    """All elements, those of a convolution in the order of channels last."""
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).reshape(-1)


def _shaped(part: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_in_memory_order`, without a copy."""
    if len(shape) != 4:
        return part.view(shape)
    return part.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
