"""Who holds the parameters: one file an engine, and the choice between them."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from .base import Engine
from .checks import check_known, check_scheme
from .fsdp import FSDPEngine, is_sharded
from .hsdp import HSDPEngine, has_replicas


def engine_of(model: nn.Module, base: Optimizer) -> Engine:
    """The engine that a prepared model belongs to.

    Args:
        model: what `deepspeed.initialize` returned, a module after `fully_shard`, or any other module.
        base: the optimizer that was given to it.

    Raises:
        ValueError: for an engine, or a setting of it, under which extrapolation would be silently wrong.
    """
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        from .deepspeed import deepspeed_engine

        return deepspeed_engine(model, base)
    if is_sharded(model):
        return HSDPEngine(model, base) if has_replicas(base) else FSDPEngine(model, base)
    return Engine(base)


__all__ = ["Engine", "check_known", "check_scheme", "engine_of"]
