"""FSDP2: parameters sharded by `torch.distributed.fsdp.fully_shard`."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .base import Engine


class FSDPEngine(Engine):
    """Each process moves its own shards, and gathers what it has moved with the next forward pass."""

    name = "FSDP2"
    is_sharded = True

    def __init__(self, model: nn.Module, base: Optimizer) -> None:
        super().__init__(base)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def moved(self) -> None:
        """Drop gathered parameters: after a pass without backward the root keeps its own, which would not move."""
        for module in self._modules:
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` holds some of the module's parameters."""
    return any(isinstance(p, DTensor) for p in model.parameters())
