"""DeepSpeed, stages 0 to 2: every process holds all weights, and the base optimizer steps flat copies of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..buffers import Buffers
from ..config import ExtrapConfig
from .base import Engine

_NEED_X = ("save_checkpoint", "save_16bit_model", "load_checkpoint")
"""Methods of DeepSpeed that read or write the weights, and may be called in the middle of a step."""


class DeepSpeedEngine(Engine):
    """Stage 0 in float32, where the base optimizer steps the weights themselves.

    A fresh direction comes from `torch.autograd.grad`, which runs the hooks of the leaves and none of DeepSpeed's.
    """

    name = "DeepSpeed, stage 0"
    may_swap = False
    probes_by_hooks = True

    def __init__(self, engine: Any, base: Optimizer) -> None:
        super().__init__(base)
        inner = engine.basic_optimizer
        if getattr(inner, "base", inner) is not base:
            raise ValueError(
                f"the DeepSpeed engine steps with a {type(inner).__name__} and not with this optimizer; allowed: "
                "deepspeed.initialize(optimizer=...) with it, and no optimizer in DeepSpeed's own configuration."
            )
        self._engine = engine
        self._stepped_with: list[dict[str, Any]] | None = None

    @contextmanager
    def probing(self) -> Iterator[Callable[[Tensor], None]]:
        """See `Engine.probing`; `.grad` is not touched, and DeepSpeed's own forward pass is not used.

        That would register hooks on the outputs that divide and reduce gradients.
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
        """See `Engine.follow`; wraps the engine's `step`, and the methods that save and load, which start from x."""
        engine = self._engine

        def followed(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            ends = engine.is_gradient_accumulation_boundary() or not engine.managed_gradient_accumulation()
            before(ends)
            if not (ends and self.steps_inside):
                return step(*args, **kwargs)
            with self._options_of_this_step():
                result = step(*args, **kwargs)
                after(engine.was_step_applied())
            return result

        def from_x(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before(False)
            return method(*args, **kwargs)

        _put_around(engine, "step", followed)
        for name in _NEED_X:
            _put_around(engine, name, from_x)

    @property
    def _options(self) -> list[dict[str, Any]]:
        """The options of each group; loading a state replaces these dictionaries."""
        return self._base.param_groups if self._stepped_with is None else self._stepped_with

    @contextmanager
    def _options_of_this_step(self) -> Iterator[None]:
        """Keep the options of this step: DeepSpeed's step ends with the scheduler's, which changes them."""
        groups = self._base.param_groups
        self._stepped_with = [{name: deepcopy(v) for name, v in group.items() if name != "params"} for group in groups]
        try:
            yield
        finally:
            self._stepped_with = None


class _Around(partial[Any]):
    """A function that replaces a method of DeepSpeed, and is called with it."""


def _put_around(engine: Any, name: str, function: Callable[..., Any]) -> None:
    method = getattr(engine, name)
    # A second connect replaces the first.
    setattr(engine, name, _Around(function, method.args[0] if isinstance(method, _Around) else method))


class FlatDeepSpeedEngine(DeepSpeedEngine):
    """Stages 1 and 2, and stage 0 in bfloat16 or float16: the base optimizer steps this process's part of flat copies.

    DeepSpeed overwrites the weights with the stepped copies. Each process has a part of the averaged gradient; as a
    direction it is gathered, with one all-gather per step.
    """

    name = "DeepSpeed, stages 0 to 2"
    steps_inside = True

    def __init__(self, engine: Any, base: Optimizer) -> None:
        super().__init__(engine, base)
        self._weights, self._copies = _layout(engine.optimizer)
        self._gradient: dict[Tensor, Tensor] = {}

    @property
    def loss_scale(self) -> float:
        """See `Engine.loss_scale`."""
        optimizer = self._engine.optimizer
        # DeepSpeed scales the loss for these optimizers alone.
        return float(getattr(optimizer, "loss_scale", 1)) if hasattr(optimizer, "scale_if_loss") else 1.0

    def check(self, config: ExtrapConfig) -> None:
        """See `Engine.check`."""
        refuse_precondition(config, self.name)

    def groups(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """See `Engine.groups`."""
        return list(zip(self._options, self._weights, strict=True))

    def gradients(self) -> Buffers:
        """See `Engine.gradients`; returns what `collect` has copied, once."""
        taken, self._gradient = self._gradient, {}
        return [taken.get(p) for p in self.params()]

    def collect(self, stepped: Sequence[Tensor]) -> None:
        """See `Engine.collect`."""
        group = self._engine.data_parallel_group
        for copy in self._copies:
            if copy.stepped.grad is None or not any(copy.stepped is tensor for tensor in stepped):
                continue
            grad = copy.stepped.grad.to(copy.weights[0].device).flatten()
            if copy.is_partitioned:
                whole = grad.new_empty(grad.numel() * dist.get_world_size(group))
                dist.all_gather_into_tensor(whole, grad.contiguous(), group=group)
                grad = whole
            start = 0
            for p, size in zip(copy.weights, copy.sizes, strict=True):
                self._gradient[p] = grad[start : start + p.numel()].view_as(p).clone()
                start += size


@dataclass(frozen=True)
class _Copy:
    """A tensor that the base optimizer steps, and the weights that DeepSpeed overwrites with it.

    Attributes:
        weights: in the order in which the tensor holds them.
        sizes: elements that the tensor, of all processes together, has for each weight, with padding.
        stepped: the tensor.
        is_partitioned: whether it is this process's part of them.
    """

    weights: list[Tensor]
    sizes: list[int]
    stepped: Tensor
    is_partitioned: bool


def _layout(optimizer: Any) -> tuple[list[list[Tensor]], list[_Copy]]:
    """The weights of each group, and the copies of them that are stepped."""
    for weights, stepped, is_partitioned in (
        ("round_robin_bit16_groups", "single_partition_of_fp32_groups", True),
        ("bf16_groups", "fp32_groups_flat_partition", True),
        ("fp16_groups", "fp32_groups_flat", False),
        ("fp16_groups", "fp32_groups", False),
    ):
        if not hasattr(optimizer, weights) or not hasattr(optimizer, stepped):
            continue
        groups: list[list[Tensor]] = [list(group) for group in getattr(optimizer, weights)]
        padding = getattr(optimizer, "round_robin_bit16_padding", [[0] * len(group) for group in groups])
        copies = []
        for group, copy, padded in zip(groups, getattr(optimizer, stepped), padding, strict=True):
            sizes = [p.numel() + more for p, more in zip(group, padded, strict=True)]
            if isinstance(copy, Tensor):
                copies.append(_Copy(group, sizes, copy, is_partitioned))
            else:
                copies += [_Copy([p], [p.numel()], c, is_partitioned) for p, c in zip(group, copy, strict=True)]
        return groups, copies
    raise ValueError(
        f"the engine is DeepSpeed with a {type(optimizer).__name__}, whose weights are not found; allowed: ZeRO stages "
        "0 to 3 in float32, bfloat16 or float16."
    )


def refuse_precondition(config: ExtrapConfig, name: str) -> None:
    """Refuse `precondition`, where the state of the base optimizer is flat."""
    if config.precondition:
        raise ValueError(
            f"precondition is true, but under {name} the state of the base optimizer lies in flat parts; allowed: "
            "precondition false, or past-update."
        )
