"""DeepSpeed, stage 3: every process holds a part of every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from ..buffers import Buffers
from ..config import ExtrapConfig
from .deepspeed import DeepSpeedEngine, refuse_precondition


class ZeRO3Engine(DeepSpeedEngine):
    """Moves the parts that this process holds, presented as 1-dim DTensors over the elements of each weight."""

    name = "DeepSpeed, stage 3"
    is_sharded = True
    steps_inside = True
    probes_by_hooks = False

    def __init__(self, engine: Any, base: Optimizer) -> None:
        super().__init__(engine, base)
        zero = engine.optimizer
        if any(flat is None for flat in zero.fp16_partitioned_groups_flat):
            raise ValueError(
                "the engine is DeepSpeed, stage 3, with weights swapped to disk, where they cannot be moved; allowed: "
                "offload_param to the device none or cpu."
            )
        if getattr(zero, "backup_optimizer", None) is not None:
            raise ValueError(
                "the engine is DeepSpeed, stage 3, with an offload_optimizer ratio below 1, where an AdamW of its own "
                "steps a share of the weights; allowed: ratio 1."
            )
        self._zero = zero
        group = engine.data_parallel_group
        self._mesh = DeviceMesh.from_group(group, zero.fp16_partitioned_groups_flat[0].device.type)
        self._rank = torch.distributed.get_rank(group)
        self._gradient: dict[int, Tensor] = {}
        self._shards: dict[Tensor, tuple[int, Tensor]] = {}

    @property
    def loss_scale(self) -> float:
        """See `Engine.loss_scale`."""
        return float(self._zero.loss_scale)

    def check(self, config: ExtrapConfig) -> None:
        """See `Engine.check`."""
        refuse_precondition(config, self.name)
        if config.scaling == "filter":
            raise ValueError("scaling is 'filter', but ZeRO-3 cuts through filters; allowed: layer, or another engine.")

    def leaves(self) -> list[Any]:
        """See `Engine.leaves`."""
        return [p for _, weights in self._weights() for p in weights]

    def groups(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """See `Engine.groups`."""
        return [(options, [self._shard(p) for p in weights]) for options, weights in self._weights()]

    def _weights(self) -> list[tuple[dict[str, Any], list[Any]]]:
        found: list[tuple[dict[str, Any], list[Any]]] = [(options, []) for options in self._options]
        for subgroup, weights in enumerate(self._zero.fp16_groups):
            found[self._zero.sub_group_to_group_id[subgroup]][1].extend(weights)
        return found

    def _shard(self, weight: Any) -> Tensor:
        """This process's part of a weight, a view of the memory that DeepSpeed gathers from."""
        address = weight.ds_tensor.data_ptr()
        known = self._shards.get(weight)
        if known is None or known[0] != address:
            known = self._shards[weight] = (address, self._as_dtensor(weight, weight.ds_tensor.detach()))
        return known[1]

    def _as_dtensor(self, weight: Any, part: Tensor) -> Tensor:
        """A part without its padding."""
        size, numel = weight.ds_tensor.numel(), weight.ds_numel
        held = min(max(numel - self._rank * size, 0), size)
        return DTensor.from_local(
            part.flatten()[:held], self._mesh, [Shard(0)], run_check=False, shape=torch.Size([numel]), stride=(1,)
        )

    def moved(self) -> None:
        """See `Engine.moved`: drops gathered weights. Small ones stay gathered between steps, and would not move."""
        for _, weights in self._weights():
            gathered = [p for p in weights if p.ds_status.name == "AVAILABLE"]
            if gathered:
                gathered[0].partition(gathered, has_been_updated=False)

    def gradients(self) -> Buffers:
        """See `Engine.gradients`; returns what `collect` has copied, once."""
        taken, self._gradient = self._gradient, {}
        return [None if (g := taken.get(p.ds_id)) is None else self._as_dtensor(p, g) for p in self.leaves()]

    def collect(self, stepped: Sequence[Tensor]) -> None:
        """See `Engine.collect`."""
        for flat, weights in zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True):
            if flat.grad is None or not any(flat is tensor for tensor in stepped):
                continue
            pieces = torch.split(flat.grad, [p.ds_tensor.numel() for p in weights])
            self._gradient |= {
                p.ds_id: piece.to(p.ds_tensor.device, copy=True) for p, piece in zip(weights, pieces, strict=True)
            }

    @contextmanager
    def probing(self) -> Iterator[Callable[[Tensor], None]]:
        """See `Engine.probing`: DeepSpeed's own backward pass, which averages; its gradients are cleared after it."""
        try:
            yield self._engine.backward
        finally:
            self._zero.zero_grad()

    def probed(self) -> Buffers:
        """See `Engine.probed`: read from DeepSpeed's buffers."""
        gradients = self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        return [self._as_dtensor(p, gradients[p.ds_id].to(p.ds_tensor.device)) for p in self.leaves()]
