"""BatchNorm's running statistics, where a step has several forward passes, some of them at y."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running mean and variance of every BatchNorm layer, which evaluation normalizes with."""
    return [t for m in batch_norms(model) for t in (m.running_mean, m.running_var) if t is not None]


@contextmanager
def running_statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """Training passes inside normalize by their batch, and do not update running statistics.

    Args:
        model: contains the layers; None for none.
    """
    layers = [] if model is None else [m for m in batch_norms(model) if m.training and m.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def recalibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any]) -> None:
    """Set the running statistics to the mean over batches of each batch's mean and unbiased variance.

    The random state, modes and parameters do not change. Without BatchNorm layers there is no pass.

    Args:
        model: has the parameters that the statistics are for.
        batches: arguments of `forward`, with equal weights.
        forward: one pass of the model, in the precision of training.

    Source: `torch.optim.swa_utils.update_bn` (Izmailov et al. 2018).
    """
    if not batch_norms(model):
        return
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type not in ("cpu", "meta")})
    kind = next(model.parameters()).device.type
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in batch_norms(model)]
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind if devices else "cuda"):
            update_bn(batches, _Passes(model, forward))
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum


class _Passes(nn.Module):
    """A model whose forward pass takes a batch of any kind."""

    def __init__(self, model: nn.Module, forward: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._pass = forward

    def forward(self, batch: Any) -> None:
        self._pass(batch)
