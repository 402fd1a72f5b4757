"""DeepSpeed, stages 0 to 2: every process holds all weights, and the base optimizer steps flat copies of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..memory import Buffers
from .base import Engine


class DeepSpeedEngine(Engine):
    """Stage 0 in float32, where the base optimizer steps the weights themselves.

    A fresh direction comes from `torch.autograd.grad`, which runs the hooks of the leaves and none of DeepSpeed's.
    """

    name = "DeepSpeed, stage 0"
    probes_by_hooks = True

    def __init__(self, engine: Any, base: Optimizer) -> None:
        super().__init__(base)
        self._engine = engine

    @contextmanager
    def probing(self) -> Iterator[Callable[[Tensor], None]]:
        """See `Engine.probing`; `.grad` is not touched, and the pass is none of DeepSpeed's.

        Its forward pass would hang hooks on its outputs that divide gradients and reduce them.
        """
        from deepspeed.runtime.torch_autocast import autocast_if_enabled

        engine = self._engine

        def forward(*args: Any, **kwargs: Any) -> Any:
            with autocast_if_enabled(engine):
                return engine.module(*args, **kwargs)

        engine.forward = forward
        try:
            yield self._backward
        finally:
            del engine.forward

    def _backward(self, loss: Tensor) -> None:
        wanted = [p for p in self.leaves() if p.requires_grad]
        loss = loss * (self.loss_scale / self._engine.gradient_accumulation_steps())
        torch.autograd.grad(loss, wanted, allow_unused=True)

    def gradient_norm(self) -> float | None:
        """See `Engine.gradient_norm`."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def average(self, direction: Sequence[Tensor | None]) -> None:
        """See `Engine.average`."""
        for d in direction:
            if d is not None:
                dist.all_reduce(d, group=self._engine.data_parallel_group)
                d.div_(dist.get_world_size(self._engine.data_parallel_group))

    def follow(self, before: Callable[[bool], None], after: Callable[[bool], None]) -> None:
        """See `Engine.follow`; the engine's `step` becomes one that does so."""
        engine, step = self._engine, self._engine.step

        def followed(*args: Any, **kwargs: Any) -> Any:
            ends = engine.is_gradient_accumulation_boundary()
            before(ends)
            result = step(*args, **kwargs)
            if ends and self.steps_inside:
                after(engine.was_step_applied())
            return result

        engine.step = followed


class FlatDeepSpeedEngine(DeepSpeedEngine):
    """Stages 1 and 2, and stage 0 in bfloat16 or float16: the base optimizer steps this process's part of flat copies.

    DeepSpeed overwrites the weights with what was stepped. An averaged gradient is there in parts alone: as a direction
    it is gathered, one all-gather a step.
    """

    name = "DeepSpeed, stages 0 to 2"
    steps_inside = True

    def __init__(self, engine: Any, base: Optimizer) -> None:
        super().__init__(engine, base)
        self._options = list(base.param_groups)
        self._weights, self._flat = _layout(engine.optimizer)
        self._gradient: dict[Tensor, Tensor] = {}

    @property
    def loss_scale(self) -> float:
        """See `Engine.loss_scale`."""
        return float(self._engine.optimizer.loss_scale)

    def groups(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """See `Engine.groups`."""
        return list(zip(self._options, self._weights, strict=True))

    def gradients(self) -> Buffers:
        """See `Engine.gradients`; what `collect` has taken, once."""
        taken, self._gradient = self._gradient, {}
        return [taken.get(p) for p in self.params()]

    def collect(self, stepped: Sequence[Tensor]) -> None:
        """See `Engine.collect`."""
        group = self._engine.data_parallel_group
        for index, part in enumerate(self._flat):
            if part.grad is None or not any(part is tensor for tensor in stepped):
                continue
            weights = self._weights[index]
            grad = part.grad.to(weights[0].device)
            if part.numel() < sum(p.numel() for p in weights):
                whole = grad.new_empty(part.numel() * dist.get_world_size(group))
                dist.all_gather_into_tensor(whole, grad.contiguous(), group=group)
                grad = whole
            pieces = torch.split(grad[: sum(p.numel() for p in weights)], [p.numel() for p in weights])
            self._gradient |= {p: piece.view_as(p) for p, piece in zip(weights, pieces, strict=True)}


def _layout(optimizer: Any) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The weights of each group in the order of its flat copy, and the part of it that this process steps."""
    for weights, parts in (
        ("round_robin_bit16_groups", "single_partition_of_fp32_groups"),
        ("bf16_groups", "fp32_groups_flat_partition"),
        ("fp16_groups", "fp32_groups_flat"),
    ):
        if hasattr(optimizer, weights) and hasattr(optimizer, parts):
            return [list(group) for group in getattr(optimizer, weights)], list(getattr(optimizer, parts))
    raise ValueError(
        f"the engine is DeepSpeed with a {type(optimizer).__name__}, whose weights are not found; allowed: ZeRO stages "
        "0 to 3 in float32, bfloat16 or float16."
    )


def deepspeed_engine(engine: Any, base: Optimizer) -> Engine:
    """The engine for what `deepspeed.initialize` returned.

    Raises:
        ValueError: for DeepSpeed without this base optimizer, or with weights that are swapped to disk.
    """
    inner = engine.basic_optimizer
    if getattr(inner, "base", inner) is not base:
        raise ValueError(
            f"the DeepSpeed engine steps with a {type(inner).__name__} and not with this optimizer; allowed: "
            "deepspeed.initialize(optimizer=...) with it, and no optimizer in DeepSpeed's own configuration."
        )
    if engine.zero_optimization_stage() == 3:
        from .zero3 import ZeRO3Engine

        return ZeRO3Engine(engine, base)
    if engine.optimizer is inner:
        return DeepSpeedEngine(engine, base)
    return FlatDeepSpeedEngine(engine, base)
