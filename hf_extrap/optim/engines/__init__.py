"""Distributed engines behind one interface: one file each, and the choice between them.

To add one, write its file and a row of `REGISTRY`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .base import Engine
from .checks import check_arguments, check_known, check_params, check_scheme, needs_closure, steps_in_backward
from .fsdp import is_sharded
from .hsdp import has_replicas


def _is_deepspeed(model: Any) -> bool:
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


REGISTRY: tuple[tuple[Callable[[Any, Optimizer], bool], str], ...] = (
    (lambda m, base: _is_deepspeed(m) and m.zero_optimization_stage() == 3, "zero3:ZeRO3Engine"),
    (lambda m, base: _is_deepspeed(m) and m.optimizer is m.basic_optimizer, "deepspeed:DeepSpeedEngine"),
    (lambda m, base: _is_deepspeed(m), "deepspeed:FlatDeepSpeedEngine"),
    (lambda m, base: is_sharded(m) and has_replicas(base), "hsdp:HSDPEngine"),
    (lambda m, base: is_sharded(m), "fsdp:FSDPEngine"),
)
"""Whether a prepared model belongs to an engine, and the engine as `module:class`; the first match counts."""


def engine_of(model: nn.Module, base: Optimizer) -> Engine:
    """The engine of a prepared model.

    Args:
        model: what `deepspeed.initialize` returned, a module after `fully_shard`, or any other module.
        base: the optimizer that was given to it.

    Raises:
        ValueError: for an engine, or a setting of it, under which extrapolation would be silently wrong.
    """
    for matches, name in REGISTRY:
        if matches(model, base):
            module, _, kind = name.partition(":")
            engine: Engine = getattr(import_module(f".{module}", __name__), kind)(model, base)
            return engine
    return Engine(base)


__all__ = [
    "REGISTRY",
    "Engine",
    "check_arguments",
    "check_known",
    "check_params",
    "check_scheme",
    "engine_of",
    "needs_closure",
    "steps_in_backward",
]
