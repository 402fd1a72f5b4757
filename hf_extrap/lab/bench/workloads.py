"""Workloads: the models of the recipes at their batch shapes, on random data, and flat lists of parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_extrap.recipes.precision import cpu_has_bf16

from .timing import synchronize

Loss = Callable[[nn.Module, int, float], Tensor]


@dataclass(frozen=True)
class Workload:
    """One model to train.

    Attributes:
        title: description without the precision.
        build: makes the model, on the CPU.
        loss: of a model, a worker's index, and the fraction of its batch that is used.
        base: `nesterov` or `adamw`.
        workers: virtual workers of a step.
        autocasts: whether passes run in `precision_of` the device; otherwise in float32.
        flat: whether gradients are given instead of computed, so that the optimizer alone takes time.
        needs_gpu: whether a CPU would take minutes per step.
        bytes_each: memory of one method's parameters, gradients and states, if it is large.
    """

    title: str
    build: Callable[[], nn.Module]
    loss: Loss | None
    base: str
    workers: int = 1
    autocasts: bool = False
    flat: bool = False
    needs_gpu: bool = False
    bytes_each: int = 0

    def optimizer(self, params: Sequence[Tensor]) -> Optimizer:
        """The base optimizer of the recipe."""
        if self.base == "adamw":
            return torch.optim.AdamW(params, lr=1e-3, fused=True)
        return torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True, fused=True)


class Flat(nn.Module):
    """A list of parameters whose gradients are given."""

    def __init__(self, parameters: int, tensors: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(parameters // tensors) for _ in range(tensors))


def precision_of(device: torch.device) -> str:
    """Precision of the recipes: bf16 autocast, but float32 on a CPU without instructions for bf16."""
    return "bf16 autocast" if device.type != "cpu" or cpu_has_bf16() else "float32"


def _lstm() -> nn.Module:
    from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM

    config = ExtrapLstmConfig(hidden_size=200, embedding_size=200, num_hidden_layers=2, dropout=0.0)
    return ExtrapLstmForCausalLM(config)


def _marian() -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    fields: dict[str, Any] = {"vocab_size": 4000, "decoder_vocab_size": 4000, "d_model": 128}
    for side in ("encoder", "decoder"):
        fields |= {f"{side}_layers": 4, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 256}
    fields |= {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    # As in the recipe: in bf16 on a CPU, sdpa is slower at these lengths.
    fields["attn_implementation"] = "eager"
    return MarianMTModel(MarianConfig(**fields, forced_eos_token_id=None))


def _resnet() -> nn.Module:
    from hf_extrap.recipes.models import ExtrapResNetConfig, ExtrapResNetForImageClassification

    classes: dict[str, Any] = {"num_labels": 10}
    return ExtrapResNetForImageClassification(ExtrapResNetConfig(**classes))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def token_loss(rows: int, length: int, vocabulary: int) -> Loss:
    """The loss of predicting random tokens, `rows` × `length` for each worker."""

    def loss(model: nn.Module, worker: int, share: float) -> Tensor:
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(worker)
        shape = max(1, round(share * rows)), length
        tokens = torch.randint(3, vocabulary, shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision_of(device) != "float32"):
            return model(input_ids=tokens, labels=tokens).loss

    return loss


def image_loss(rows: int) -> Loss:
    """The loss of classifying random images, `rows` for each worker."""

    def loss(model: nn.Module, worker: int, share: float) -> Tensor:
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(worker)
        used = max(1, round(share * rows))
        images = torch.randn(used, 3, 32, 32, generator=generator, device=device)
        labels = torch.randint(10, (used,), generator=generator, device=device)
        return model(pixel_values=images, labels=labels).loss

    return loss


def autocast(loss: Loss) -> Loss:
    """The loss in bf16 autocast; without its cache, because parameters change between the passes of a step."""

    def with_autocast(model: nn.Module, worker: int, share: float) -> Tensor:
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, cache_enabled=False):
            return loss(model, worker, share)

    return with_autocast


def flat_list(parameters: int, tensors: int) -> Workload:
    """The workload of a flat list of float32 parameters in tensors of equal size."""
    title = f"{parameters:,} parameters in {tensors:,} tensors, gradients given, AdamW"
    return Workload(title, lambda: Flat(parameters, tensors), None, "adamw", flat=True, bytes_each=24 * parameters)


LSTM = "LSTM 2 × 200, 33 K words, 4 × 64 × 16 tokens, AdamW"
MARIAN = "Transformer 4 + 4 × 128, 2 × 512 tokens, AdamW"
RESNET = "ResNet-20, 32 × 256 images, SGD + Nesterov"
GPT2 = "GPT-2 small, 32 × 1,024 tokens, AdamW"
WORKLOADS: dict[str, Workload] = {
    "lstm": Workload(LSTM, _lstm, token_loss(64, 16, 33_000), "adamw", 4, autocasts=True),
    "translation": Workload(MARIAN, _marian, token_loss(32, 16, 4_000), "adamw", 2, autocasts=True),
    "resnet": Workload("ResNet-20, 128 images, SGD + Nesterov", _resnet, image_loss(128), "nesterov"),
    "resnet-8192": Workload(RESNET, _resnet, autocast(image_loss(256)), "nesterov", 32, True, False, True),
    "gpt2": Workload(GPT2, _gpt2, token_loss(32, 1024, 50_000), "adamw", 1, True, False, True, 24 * 124_439_808),
    **{
        f"flat-{parameters:.0e}-{tensors}".replace("e+0", "e"): flat_list(parameters, tensors)
        for parameters in (10**6, 10**7, 10**8, 10**9)
        for tensors in (10, 10_000)
    },
}
"""Every workload, by name."""


class GivenGradients(torch.autograd.Function):
    """A loss with given gradients: the backward pass hands them to hooks and parameters without a copy."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        # A tensor without other references becomes `.grad` without a copy.
        return None, *(gradient.detach() for gradient in ctx.gradients)


@dataclass
class Made:
    """A model with its trained parameters and, for a flat list, their gradients.

    Attributes:
        pass_seconds: seconds spent in `backward`, except for a flat list, whose pass consists of hooks.
    """

    workload: Workload
    device: torch.device
    model: nn.Module = field(init=False)
    params: list[nn.Parameter] = field(init=False)
    gradients: list[Tensor] = field(init=False)
    pass_seconds: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        with self.device:
            self.model = self.workload.build().to(self.device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.gradients = [torch.full_like(p, 1e-3) for p in self.params] if self.workload.flat else []

    def loss(self, worker: int, share: float = 1.0) -> Tensor:
        """The worker's loss, divided by the number of workers."""
        if self.workload.loss is None:
            given: Tensor = GivenGradients.apply(self.gradients, *self.params)
            return given
        return self.workload.loss(self.model, worker, share) / self.workload.workers

    def backward(self, worker: int, share: float = 1.0) -> None:
        """A forward and backward pass of the worker at the current parameters."""
        synchronize(self.device)
        started = time.perf_counter()
        loss = self.loss(worker, share)
        if not self.workload.flat:
            loss.backward()
        synchronize(self.device)
        self.pass_seconds += time.perf_counter() - started
        if self.workload.flat:
            loss.backward()
