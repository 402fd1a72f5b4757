"""A pass at x whose gradient is a direction and no part of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .batch_norm import running_statistics_kept
from .engines.base import Engine
from .protocol import ExtrapolatedOptimizer
from .scheme import Scheme


@contextmanager
def fresh_gradient(
    scheme: Scheme, engine: Engine, worker: int, scale: float, model: nn.Module | None, keep_random_state: bool
) -> Iterator[Callable[[Tensor], None]]:
    """Store the gradient of the backward passes inside as a worker's direction.

    `.grad`, the running statistics of BatchNorm and, if asked for, the random state are left as they were.

    Args:
        scheme: its direction stores the gradient.
        engine: holds the parameters.
        worker: of this process.
        scale: multiplies a gradient, to remove the loss scale.
        model: the module that is passed, if known.
        keep_random_state: restore it, so that the pass at y has the same dropout masks.

    Yields:
        The function that starts a backward pass from a loss.
    """
    direction, hooks, leaves = scheme.direction, scheme.hooks, engine.leaves()
    store = direction.store
    by_hooks = direction.local or engine.probes_by_hooks
    hooks.attach(leaves)
    buffers, filled = store.start(worker, len(leaves)), set[int]()
    try:
        with hooks.aside():
            if by_hooks:
                hooks.into(buffers, filled, scale, direction.dtype)
            with engine.probing() as backward:
                with random_state_kept(engine.params(), keep_random_state):
                    with _without_averaging(model, direction.local), running_statistics_kept(model):
                        yield backward
                if not by_hooks:
                    store.write(worker, scaled(engine.probed(), scale), direction.dtype)
            if by_hooks:
                store[worker] = [b if i in filled else None for i, b in enumerate(buffers)]
                if not direction.local:
                    engine.average(store[worker])
    except BaseException:
        store.pop(worker, None)
        raise


def random_state_kept(params: Sequence[Tensor], keep: bool = True) -> AbstractContextManager[Any]:
    """Restore the random state of the CPU and of the parameters' devices at the end."""
    if not keep:
        return nullcontext()
    devices = {p.device for p in params if p.device.type not in ("cpu", "meta")}
    if not devices:
        return torch.random.fork_rng(devices=[])
    kind = next(iter(devices)).type
    return torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices), device_type=kind)


def _without_averaging(model: nn.Module | None, local: bool) -> AbstractContextManager[Any]:
    # A static graph's first pass must be averaged: DDP learns from it when a gradient is ready.
    if local and isinstance(model, DistributedDataParallel):
        if not model.static_graph or model._static_graph_delay_allreduce_enqueued:
            return model.no_sync()
    return nullcontext()


def scaled(gradients: Sequence[Tensor | None], factor: float) -> list[Tensor | None]:
    """Each gradient times a factor."""
    return [g if g is None or factor == 1 else g * factor for g in gradients]


@torch.enable_grad()
def evaluate(optimizer: ExtrapolatedOptimizer, closure: Callable[[], Any]) -> Any:
    """The loss of a closure at y; where the step probes, it is evaluated at x first."""
    if optimizer.wants_probe:
        with optimizer.probing():
            closure()
    optimizer.train()
    return closure()


@contextmanager
def pass_at_y(optimizer: ExtrapolatedOptimizer, worker: int) -> Iterator[None]:
    """A worker's passes inside are at its y, and x is put back; after an error, such as one of memory, for good."""
    try:
        optimizer.train(worker)
        yield
    except BaseException:
        optimizer.restore(keep=False)
        optimizer.reset_step()
        raise
    optimizer.restore()
