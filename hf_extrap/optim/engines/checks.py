"""What is refused before any parameter is moved."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..config import ExtrapConfig
from ..sharding import is_sharded
from .base import Engine
from .hsdp import has_replicas


def check_arguments(base: Any, config: ExtrapConfig, virtual_workers: Any) -> None:
    """Refuse arguments of `Extrapolated` that no engine can carry out.

    Raises:
        TypeError: if `base` is not a torch optimizer, or wraps one that extrapolates already.
        ValueError: in one sentence that names the argument and what is allowed.
    """
    if not isinstance(base, Optimizer) or hasattr(base, "wants_probe"):
        raise TypeError(f"base is a {type(base).__name__}; allowed: any torch.optim.Optimizer but Extrapolated.")
    if isinstance(virtual_workers, bool) or not isinstance(virtual_workers, int) or virtual_workers < 1:
        raise ValueError(f"virtual_workers is {virtual_workers!r}; allowed: a whole number >= 1.")
    name = type(base).__name__
    if steps_in_backward(base):
        raise ValueError(f"base is {name}, which steps inside the backward pass; allowed: {name} without Extrapolated.")
    if config.moves and needs_closure(base):
        raise ValueError(
            f"base is {name}, which evaluates its closure at points of its own; allowed: direction 'none', or another "
            "optimizer."
        )
    check_params([p for group in base.param_groups for p in group["params"]], config)


def needs_closure(base: Optimizer) -> bool:
    """Whether every step needs a closure, as that of LBFGS."""
    kind: Any = type(base)
    return _step_needs_closure(kind)


@cache
def _step_needs_closure(kind: Any) -> bool:
    _, *parameters = inspect.signature(kind.step).parameters.values()
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def steps_in_backward(base: Optimizer) -> bool:
    """Whether hooks of the backward pass step each parameter, as those of LOMO and of layer-wise GaLore and APOLLO."""
    return any(kind.__name__ in ("Lomo", "AdaLomo", "LayerWiseDummyOptimizer") for kind in type(base).__mro__)


def check_params(params: Sequence[Tensor], config: ExtrapConfig) -> None:
    """Refuse parameters that cannot be moved, with a ValueError."""
    for place, p in enumerate(params if config.moves else ()):
        if p.is_complex():
            raise ValueError(f"parameter {place} is {p.dtype}; allowed: real parameters, or direction 'none'.")
        if p.device.type == "meta":
            raise ValueError(f"parameter {place} is on the meta device; allowed: one with memory, or direction 'none'.")
        if not isinstance(p, DTensor) and any(n > 1 and s == 0 for n, s in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(
                f"parameter {place} of shape {tuple(p.shape)} is expanded: several of its elements share memory; "
                "allowed: parameters with one address per element, or direction 'none'."
            )


def check_scheme(config: ExtrapConfig, engine: Engine, base: Optimizer) -> None:
    """Refuse a scheme that the engine cannot carry out.

    Raises:
        ValueError: in one sentence that names the field and what is allowed.
    """
    sharded = engine.is_sharded or any(map(is_sharded, engine.params()))
    # Before connect, sharded parameters of several replicas may turn out to be HSDP's.
    has_own = engine.has_local_gradients or (type(engine) is Engine and has_replicas(base))
    if sharded and not has_own and config.is_local and config.direction != "none":
        raise ValueError(
            "scope is 'local', but the parameters are sharded (FSDP or ZeRO-3), so that no worker has its own y; "
            "allowed: scope 'global' (extragradient, optimistic, past-update, noise), fully_shard over a mesh of "
            "replicas and shards (HSDP), or unsharded weights."
        )
    engine.check(config)


def check_known(engine: Engine, given: Sequence[weakref.ref[Tensor]]) -> None:
    """Refuse to move parameters that an engine has replaced before `connect` was called.

    Args:
        engine: the connected one.
        given: the parameters that the base optimizer was made with; empty after `connect`.

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
            "an engine has replaced the parameters: call optimizer.connect(engine), with what deepspeed.initialize "
            "returned, before training."
        )
