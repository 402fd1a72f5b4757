"""The tiny language model in every precision, and the plain loop that trains it under watch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.measuring import Step, Watch
from tests.support.plain_loop import values
from tests.support.tiny_trainer import Sentences, gpt2

BATCH = Sentences(16).rows


def unchanged(model: nn.Module) -> nn.Module:
    return model


def in_bf16(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16)


def checkpointed(use_reentrant: bool) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        return model.train()

    return change


def with_adapters(model: nn.Module) -> nn.Module:
    """LoRA on every linear layer."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=4, target_modules=["c_attn", "c_fc", "c_proj"], lora_dropout=0.0, fan_in_fan_out=True)
    return get_peft_model(model, adapters)


def of_bf16(change: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    return lambda model: change(in_bf16(model))


@dataclass(frozen=True)
class Mode:
    """How to train: what is done to the model, in which type passes compute, and whether the loss is scaled."""

    change: Callable[[nn.Module], nn.Module] = unchanged
    autocast: torch.dtype | None = None
    scaled: bool = False
    one_context: bool = False  # both passes of a step in one autocast context
    rate: float = 0.3
    plain: Callable[[nn.Module], nn.Module] | None = None  # the same model without the mode's machinery

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", self.autocast) if self.autocast is not None else nullcontext()


MODES: dict[str, Mode] = {
    "float32": Mode(),
    "bf16 autocast": Mode(autocast=torch.bfloat16),
    "bf16 autocast, one context": Mode(autocast=torch.bfloat16, one_context=True),
    "bf16 parameters": Mode(in_bf16),
    "fp16 and GradScaler": Mode(autocast=torch.float16, scaled=True),
    "checkpointing": Mode(checkpointed(use_reentrant=False), plain=unchanged),
    "checkpointing, reentrant": Mode(checkpointed(use_reentrant=True), plain=unchanged),
    "checkpointing, bf16 autocast": Mode(checkpointed(use_reentrant=False), plain=unchanged, autocast=torch.bfloat16),
    "LoRA": Mode(with_adapters, rate=2.5),
    "LoRA on a bf16 model": Mode(of_bf16(with_adapters), rate=2.5),
    "LoRA, bf16 autocast": Mode(with_adapters, autocast=torch.bfloat16, rate=2.5),
}


@dataclass
class Trained:
    """A run: its steps, the losses at x on the batch before and after, and the scaler's skipped steps."""

    steps: list[Step]
    losses: tuple[float, float]
    optimizer: Extrapolated
    model: nn.Module
    clean: Callable[[list[Tensor]], Tensor]


def sgd(params: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=rate, momentum=0.5, nesterov=True)


def train(
    mode: Mode,
    config: ExtrapConfig,
    steps: int = 8,
    compiled: Callable[[nn.Module], Callable[..., Any]] | None = None,
    overflow_at: int | None = None,
) -> Trained:
    """Train on one batch as the README tells; at step `overflow_at` the loss scale is far too large."""
    model = mode.change(gpt2())
    params = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, backoff_factor=2.0**-50, enabled=mode.scaled)
    optimizer = Extrapolated(sgd(params, mode.rate), config, grad_scaler=scaler)
    watch = Watch(params)
    forward = compiled(model) if compiled is not None else model
    plain = (mode.plain or mode.change)(gpt2())

    def clean(point: list[Tensor]) -> Tensor:
        names = [name for name, p in plain.named_parameters() if p.requires_grad]
        with mode.context():
            inputs = {"input_ids": BATCH, "labels": BATCH}
            return torch.func.functional_call(plain, dict(zip(names, point, strict=True)), kwargs=inputs).loss

    def backward() -> None:
        with watch.forward() as tell, mode.context():
            loss = forward(input_ids=BATCH, labels=BATCH).loss
            tell(loss)
        scaler.scale(loss).backward()

    first = float(clean(values(params)))
    seen: list[Step] = []
    before: Step | None = None
    for number in range(steps):
        if number == overflow_at:
            scaler.update(2.0**60)
        # A step that the scaler withholds leaves y.
        optimizer.eval()
        step = Step(values(params), [mode.rate] * len(params), [mode.rate] * len(params), [], number=number)
        step.before, step.scale, watch.passes = before, float(scaler.get_scale()), step.passes
        step.number = optimizer.step_count
        with mode.context() if mode.one_context else nullcontext():
            if optimizer.wants_probe:
                with optimizer.probing(model=model):
                    backward()
            optimizer.train()
            backward()
        skipped = optimizer.skipped_steps
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append(step)
        before = step if optimizer.skipped_steps == skipped else None
    return Trained(seen, (first, float(clean(values(params)))), optimizer, model, clean)
