"""A small problem whose layers do not divide evenly, and one loop for sharded processes and for virtual workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import BASES, CELLS, Run, finishing, make_batch, run_steps, warm_up_and_decay
from tests.support.plain_loop import SCHEMES as SHARED

STEPS = 20
SCHEMES = {
    **SHARED,
    "extrap-auto": CELLS["extrap-auto"].config,
    "sam": CELLS["sam"].config,
    "extrap-past, on the host": ExtrapConfig.preset("extrap-past", step_ratio=0.5, direction_device="cpu"),
    "extragradient-auto": CELLS["extragradient-auto"].config,
    "optimistic, step": ExtrapConfig.preset("optimistic", step_size=0.5, scaling="step"),
    "gaussian, unscaled": ExtrapConfig.preset("gaussian", step_size=0.05, scope="global", scaling="none"),
}
Batch = Callable[[int, int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Job:
    """One run; the fields say how it differs from the simplest."""

    scheme: str
    base: str = "sgd"
    virtual_workers: int = 1  # of this process, or of its replica group
    accumulation: int = 1  # micro-batches of one worker's gradient
    reduced: str = "at the end"  # which micro-batches are: those "at the end", "all", or "all, averaged at the end"
    max_grad_norm: float | None = None
    offload: bool = False

    def __str__(self) -> str:
        changed = [f for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return ", ".join([self.scheme, *(f"{f.name}={getattr(self, f.name)}" for f in changed)])

    @property
    def config(self) -> ExtrapConfig:
        return SCHEMES[self.scheme]


class Network(nn.Module):
    """First dimensions of 7, 3 and 1 over two processes, and a layer that no batch uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.first = nn.Linear(5, 7)
        self.spare = nn.Linear(3, 2)
        self.last = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.seen: dict[str, Tensor] = {}
        """The weights that the last forward pass has used."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = {"last": self.last.weight.detach().clone(), "scale": self.scale.detach().clone()}
        return self.last(torch.tanh(self.first(inputs))) * self.scale


def batch_of_process(step: int, worker: int, index: int, process: int) -> tuple[Tensor, Tensor]:
    """One process's half of a worker's micro-batch."""
    return make_batch(step, 2 * (worker + 5 * index) + process, dtype=torch.float32)


def batch_of_worker(step: int, worker: int, index: int) -> tuple[Tensor, Tensor]:
    """What two processes that are a worker see together."""
    inputs, labels = zip(*(batch_of_process(step, worker, index, process) for process in range(2)), strict=True)
    return torch.cat(inputs), torch.cat(labels)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of what this process holds of each."""
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def sharded(mesh: Any = None, **policies: Any) -> Network:
    """One layer is a module of its own, and the root holds what is left."""
    model = Network()
    fully_shard(model.first, mesh=mesh, **policies)
    fully_shard(model, mesh=mesh, **policies)
    return model


def connected(model: nn.Module, scheme: str, base: str = "sgd", virtual_workers: int = 1) -> Extrapolated:
    optimizer = Extrapolated(BASES[base](list(model.parameters())), SCHEMES[scheme], virtual_workers=virtual_workers)
    optimizer.connect(model)
    return optimizer


def train(model: nn.Module, job: Job, workers: Sequence[int], batch: Batch) -> tuple[Run, Extrapolated]:
    """Train this process's workers, numbered over all; the run has what this process holds of x and y."""
    optimizer = connected(model, job.scheme, job.base, len(workers))
    params, A = list(model.parameters()), job.accumulation

    def backward(step: int, v: int, index: int, probe: object) -> None:
        if isinstance(model, FSDPModule):
            # Gradients of workers with their own directions must not be summed before the optimizer has them.
            ends = index == A - 1 and (job.config.is_local or v == len(workers) - 1)
            model.set_requires_gradient_sync(ends or job.reduced != "at the end")
            model.set_requires_all_reduce(ends or job.reduced == "all")
        inputs, labels = batch(step, workers[v], index)
        (nn.functional.cross_entropy(model(inputs), labels) / (A * len(workers))).backward()

    finish = finishing(optimizer, params, warm_up_and_decay(optimizer), job.max_grad_norm)
    return run_steps(params, optimizer, backward, finish, steps=STEPS, accumulation=A, held=local), optimizer


def joined(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Parameters of which two processes hold the one part and the other."""
    return [torch.cat(parts) for parts in zip(first, second, strict=True)]


def what_ran(model: nn.Module, optimizer: Extrapolated, run: Run) -> dict[str, Any]:
    """What a process leaves of a run, and the engine that really ran."""
    params = list(model.parameters())
    return {
        "x": run.x,
        "y": run.y,
        "engine": optimizer.engine.name,
        "modules": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "placements": sorted({str(p.placements) for p in params if isinstance(p, DTensor)}),
        "mesh": sorted({tuple(p.device_mesh.shape) for p in params if isinstance(p, DTensor)}),
        "sharded": sum(isinstance(p, DTensor) for p in params),
        "world_size": torch.distributed.get_world_size(),
    }
