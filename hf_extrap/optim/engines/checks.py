"""What is refused before anything is moved."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..config import ExtrapConfig
from ..shards import is_sharded
from .base import Engine
from .hsdp import has_replicas


def check_scheme(config: ExtrapConfig, engine: Engine, base: Optimizer) -> None:
    """Refuse a scheme that the engine cannot carry out.

    Raises:
        ValueError: in one sentence that names the field and what is allowed.
    """
    sharded = engine.is_sharded or any(map(is_sharded, engine.params()))
    # Before connect, sharded parameters of several replicas may yet turn out to be HSDP's.
    has_own = engine.has_local_gradients or (type(engine) is Engine and has_replicas(base))
    if sharded and not has_own and config.is_local and config.direction != "none":
        raise ValueError(
            "scope is 'local', but the parameters are sharded (FSDP or ZeRO-3), so that no worker has its own y; "
            "allowed: scope 'global' (extragradient, optimistic, past-update, noise), fully_shard over a mesh of "
            "replicas and shards (HSDP), or unsharded weights."
        )
    if engine.is_sharded and config.scaling == "filter" and "stage 3" in engine.name:
        raise ValueError("scaling is 'filter', but ZeRO-3 cuts through filters; allowed: layer, or another engine.")
    if engine.steps_inside and config.precondition:
        raise ValueError(
            f"precondition is true, but under {engine.name} the state of the base optimizer lies in flat parts; "
            "allowed: precondition false, or past-update."
        )


def check_known(engine: Engine, given: Sequence[weakref.ref[Tensor]]) -> None:
    """Refuse to move parameters that an engine has replaced and that the wrapper was not told of.

    Args:
        engine: the one that the wrapper knows.
        given: the parameters that the base optimizer came with; none once the wrapper has met its engine.

    Raises:
        RuntimeError: in one sentence that says what to call.
    """
    if not given:
        return
    params = engine.params()
    if type(engine) is Engine and any(isinstance(p, DTensor) for p in params):
        raise RuntimeError("the parameters are sharded: call optimizer.connect(model) before training.")
    replaced = ((p := ref()) is not None and p is not now for ref, now in zip(given, params, strict=False))
    if len(params) < len(given) or any(replaced):
        raise RuntimeError(
            "an engine has put other tensors in the place of the parameters: call optimizer.connect(engine), with "
            "what deepspeed.initialize returned, before training."
        )
