"""HSDP: `fully_shard` over replicas and shards; the processes that hold one copy of the weights are a worker."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from ..buffers import BufferPool, Buffers
from ..gradient_hooks import GradientHooks
from ..sharding import like
from .fsdp import FSDPEngine, ShardHooks


class HSDPEngine(FSDPEngine):
    """The processes of a replica group hold all weights together, and so can hold a y of their own."""

    name = "HSDP"
    has_local_gradients = True

    def __init__(self, model: nn.Module, base: Optimizer) -> None:
        super().__init__(model, base)
        self._mesh = _meshes(base)[0]
        with torch.no_grad():
            for p in self.params():
                self._share(p)

    def _share(self, param: Tensor) -> None:
        """Broadcast the first replica's weights, as DDP does: FSDP2 does not check that replicas are identical."""
        assert isinstance(param, DTensor)
        part = param.to_local()
        sent = part.to(self._mesh.device_type)
        dist.broadcast(sent, group=self._mesh.get_group(0), group_src=0)
        part.copy_(sent)

    def hooks(self, pool: BufferPool) -> GradientHooks:
        """See `Engine.hooks`."""
        self._hooks = ReplicaHooks(pool, self._modules)
        return self._hooks

    def worker(self) -> tuple[int, int]:
        """See `Engine.worker`: the replica group."""
        return self._mesh.get_local_rank(0), self._mesh.size(0)


class ReplicaHooks(ShardHooks):
    """Sees the replica group's own mean gradient, this process's shard of it, between reduce-scatter and all-reduce.

    FSDP2's all-reduce hook runs after its all-reduce. Its reduce-scatter, however, can be replaced by one that also
    copies its output, in which the parameters of a module lie one after another. The hooks on the parameters, which
    FSDP2 runs in the same order, tell where each one's part begins.
    """

    sees_passes = True

    def __init__(self, pool: BufferPool, modules: Sequence[FSDPModule]) -> None:
        super().__init__(pool)
        self._modules = modules
        self._scatters: list[_KeepingReduceScatter] = []
        self._last: _KeepingReduceScatter | None = None
        self._open: set[int] | None = None

    @property
    def wanted(self) -> bool:
        """Whether the gradients of this pass are copied or measured."""
        return self.listening and (self._into is not None or self.pass_squares is not None)

    def into(self, buffers: Buffers, filled: set[int], scale: float, dtype: torch.dtype | None) -> None:
        """See `GradientHooks.into`.

        Raises:
            RuntimeError: for another worker while the gradient of the last one has not been reduced.
        """
        if self._open is not None and self._open is not filled and not self._open:
            raise RuntimeError(
                "FSDP2 has not reduced the last worker's gradient and would add it to the next one's; allowed: "
                "set_requires_gradient_sync(True) and set_requires_all_reduce(True) before each worker's last backward."
            )
        self._open = filled
        self._install()
        super().into(buffers, filled, scale, dtype)

    def start_pass(self, params: Sequence[Tensor], with_squares: bool) -> None:
        """See `GradientHooks.start_pass`."""
        super().start_pass(params, with_squares)
        if self.pass_squares is not None:
            self._install()

    def forget(self) -> None:
        """See `GradientHooks.forget`."""
        super().forget()
        self._open = None
        self._last = None
        for scatter in self._scatters:
            scatter.forget()

    def reduced(self, index: int, param: Tensor) -> None:
        """See `ShardHooks.reduced`; sees the share of the last pass."""
        if not self.wanted:
            self.seen = True
            return
        assert isinstance(param, DTensor)
        part = None if self._last is None else self._last.take(param)
        if part is None:
            raise RuntimeError(
                "the gradient of a replica group cannot be seen where something else has replaced FSDP2's "
                "reduce-scatter; allowed under local scope: no set_custom_reduce_scatter after optimizer.connect."
            )
        part = part.to(param.to_local())
        self._see(index, like(param, part))

    def scattered(self, by: _KeepingReduceScatter) -> None:
        """A module's gradients have been reduced; the hooks on its parameters run next."""
        self._last = by

    def _install(self) -> None:
        if not self._scatters:
            self._scatters = [_KeepingReduceScatter(weakref.ref(self)) for _ in self._modules]
            for module, scatter in zip(self._modules, self._scatters, strict=True):
                module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]  # its class is not public


class _KeepingReduceScatter:
    """FSDP2's default reduce-scatter, which also sums the outputs of all passes since the last all-reduce."""

    def __init__(self, hooks: weakref.ref[ReplicaHooks]) -> None:
        self._hooks = hooks
        self._kept: Tensor | None = None
        self._taken: int | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate FSDP2's buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        hooks = self._hooks()
        wanted = hooks is not None and hooks.wanted
        if wanted and op != dist.ReduceOp.AVG:
            raise RuntimeError(
                f"FSDP2 reduces with {op}, from which the mean gradient of a replica group cannot be told; allowed "
                "under local scope: a reduce_dtype of float32 or bfloat16, and no set_gradient_divide_factor."
            )
        work = dist.reduce_scatter_single(
            output=output_tensor, input=input_tensor, group=group, op=op, async_op=async_op
        )
        if hooks is None or not wanted:
            return work
        if work is not None:
            work.wait()
        self._keep(output_tensor)
        hooks.scattered(self)
        return work

    def _keep(self, output: Tensor) -> None:
        """Copy to memory that is never freed: the streams that use it are ordered around whole passes."""
        if self._taken == 0 and self._kept is not None and self._kept.shape == output.shape:
            self._kept += output
            return
        if self._kept is None or self._kept.shape != output.shape or self._kept.dtype != output.dtype:
            self._kept = torch.empty_like(output)
        self._kept.copy_(output)
        self._taken = 0

    def take(self, param: DTensor) -> Tensor | None:
        """The next parameter's part; None at the end."""
        if self._kept is None or self._taken is None:
            return None
        shape = param.to_local().shape
        shard = param.placements[1]
        assert isinstance(shard, Shard)
        size = shape.numel()
        if shard.dim == 0:
            # The output is padded to the largest part.
            size = -(-param.shape[0] // param.device_mesh.size(1)) * param.shape[1:].numel()
        start, self._taken = self._taken, self._taken + size
        return self._kept[start : start + shape.numel()].view(shape) if self._taken <= self._kept.numel() else None

    def forget(self) -> None:
        """Drop what has been kept."""
        self._taken = None


def has_replicas(base: Optimizer) -> bool:
    """Whether every parameter of the optimizer is sharded over the second dimension of one mesh, and replicated over
    the first, as `fully_shard` does with a mesh of two dimensions."""
    meshes = _meshes(base)
    return bool(meshes) and all(mesh is not None and mesh == meshes[0] for mesh in meshes)


def _meshes(base: Optimizer) -> list[Any]:
    """The mesh of replicas and shards of each parameter; None where there is none, or only one shard."""
    return [
        p.device_mesh
        if isinstance(p, DTensor)
        and p.device_mesh.ndim == 2
        and p.device_mesh.size(1) > 1
        and p.placements[0].is_replicate()
        and p.placements[1].is_shard()
        else None
        for group in base.param_groups
        for p in group["params"]
    ]
