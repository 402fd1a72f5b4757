"""A small problem whose layers do not divide evenly, and one loop for sharded processes and for virtual workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.plain_loop import BASES, CELLS, Run, make_batch, warm_up_and_decay
from tests.support.plain_loop import SCHEMES as SHARED

STEPS = 20
SCHEMES = {
    **SHARED,
    "extrap-auto": CELLS["extrap-auto"].config,
    "sam": CELLS["sam"].config,
    "extrap-past, on the host": ExtrapConfig.preset("extrap-past", step_ratio=0.5, direction_device="cpu"),
    "extragradient-auto": CELLS["extragradient-auto"].config,
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
        extra = [f"{self.virtual_workers} virtual"] * (self.virtual_workers > 1)
        extra += [f"{self.accumulation} micro-batches", f"reduced {self.reduced}"] * (self.accumulation > 1)
        extra += ["clipped"] * (self.max_grad_norm is not None) + ["offloaded"] * self.offload
        return ", ".join([self.scheme, self.base, *extra])

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


def train(model: nn.Module, job: Job, workers: Sequence[int], batch: Batch) -> tuple[Run, Extrapolated]:
    """Train this process's workers, numbered over all; the run has what this process holds of x and y."""
    base = BASES[job.base](list(model.parameters()))
    optimizer = Extrapolated(base, job.config, virtual_workers=len(workers))
    optimizer.connect(model)
    return run_loop(model, optimizer, optimizer, job, workers, batch), optimizer


def run_loop(
    model: nn.Module,
    optimizer: Extrapolated,
    stepped: Any,
    job: Job,
    workers: Sequence[int],
    batch: Batch,
    backward_of: Callable[[Tensor], None] = Tensor.backward,
) -> Run:
    """The documentation's loop; `stepped` is the optimizer, or accelerate's around it."""
    params, config, A = list(model.parameters()), job.config, job.accumulation
    scheduler = warm_up_and_decay(optimizer)
    run = Run(x=[local(params)])

    def backward(step: int, k: int, index: int, ends: bool) -> None:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(ends or job.reduced != "at the end")
            model.set_requires_all_reduce(ends or job.reduced == "all")
        inputs, labels = batch(step, k, index)
        backward_of(nn.functional.cross_entropy(model(inputs), labels) / (A * len(workers)))

    for step in range(STEPS):
        if config.scope == "global" and optimizer.wants_probe:
            with optimizer.probing():
                for k in workers:
                    for index in range(A):
                        backward(step, k, index, (k, index) == (workers[-1], A - 1))
        ys = []
        for v, k in enumerate(workers):
            if config.scope == "local" and optimizer.wants_probe:
                with optimizer.probing(worker=v):
                    for index in range(A):
                        backward(step, k, index, index == A - 1)
            for index in range(A):
                optimizer.train(worker=v)
                ys += [local(params)] * (index == 0)
                # Workers with a gradient of their own must not be summed before it is seen.
                ends = index == A - 1 and (config.is_local or v == len(workers) - 1)
                backward(step, k, index, ends)
        if job.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(params, job.max_grad_norm)
        stepped.step()
        stepped.zero_grad()
        scheduler.step()
        run.x.append(local(params))
        run.y.append(ys)
    return run


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
