"""The engines of the tests, each built around a cell of `engine_problem` by the processes that torchrun starts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_extrap import Extrapolated
from tests.support.engine_problem import Cell, Engine, make_problem
from tests.support.plain_loop import BASES, warm_up_and_decay

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def build(name: str, cell: Cell, connected: bool = True) -> Engine:
    """`ddp`, `fsdp2`, or `zero0` to `zero3`; without `connect`, to see what forgetting it does."""
    if name == "ddp":
        return ddp(cell)
    if name == "fsdp2":
        return fsdp2(cell, connected)
    return zero(int(name[-1]), cell, {}, connected)


def wrapped(cell: Cell, params: list[Any]) -> Extrapolated:
    return Extrapolated(BASES[cell.base](params), cell.config, virtual_workers=cell.workers)


def ddp(cell: Cell) -> Engine:
    model = make_problem(cell)
    params = list(model.parameters())
    optimizer, parallel = wrapped(cell, params), DistributedDataParallel(model)
    optimizer.connect(parallel)

    def synchronizing(last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else parallel.no_sync()

    facts = {"model": type(parallel).__name__, "processes": dist.get_world_size(parallel.process_group)}
    return Engine(
        parallel,
        optimizer,
        warm_up_and_decay(optimizer),
        lambda: [p.detach().clone() for p in params],
        synchronizing=synchronizing,
        facts=facts | facts_of(optimizer, params),
    )


def fsdp2(cell: Cell, connected: bool = True) -> Engine:
    model = make_problem(cell)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    params: list[Any] = list(model.parameters())
    optimizer = wrapped(cell, params)
    if connected:
        optimizer.connect(model)
    facts = {"model": type(model).__name__, "processes": params[0].device_mesh.size()}
    return Engine(
        model,
        optimizer,
        warm_up_and_decay(optimizer),
        lambda: [p.detach().full_tensor().clone() for p in params],
        facts=facts | facts_of(optimizer, params),
    )


def zero(stage: int, cell: Cell, fields: dict[str, Any], connected: bool = True) -> Engine:
    """DeepSpeed, with `fields` added to its configuration.

    At stage 3 small weights stay gathered from step to step, and each weight is a sub-group that is stepped alone.
    """
    model = make_problem(cell)
    params = list(model.parameters())
    optimizer = wrapped(cell, params)
    configuration: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 7,
        "gradient_accumulation_steps": cell.accumulation,
        "gradient_clipping": cell.max_norm,
        "zero_allow_untested_optimizer": True,
        **fields,
        "zero_optimization": {
            "stage": stage,
            "sub_group_size": 10,
            "stage3_param_persistence_threshold": 20,
            "stage3_gather_16bit_weights_on_model_save": True,
            **fields.get("zero_optimization", {}),
        },
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=lambda inner: warm_up_and_decay(inner), config=configuration
    )
    if connected:
        optimizer.connect(engine)

    def gathered(read: Callable[[Any], Tensor]) -> Callable[[], list[Tensor]]:
        def whole() -> list[Tensor]:
            with deepspeed.zero.GatheredParameters(params):
                return [read(p) for p in params]

        return whole

    unfused = getattr(engine.optimizer, "fp32_groups", [])
    copies = {
        p: copy
        for group, stepped in zip(engine.optimizer.fp16_groups if unfused else [], unfused, strict=True)
        for p, copy in zip(group, stepped, strict=True)
    }

    def master(p: Any) -> Tensor:
        if not p.requires_grad:
            return p.detach()
        return copies[p].detach() if copies else safe_get_full_fp32_param(p)

    facts = {
        "model": type(engine).__name__,
        "optimizer": type(engine.optimizer).__name__,
        "stage": engine.zero_optimization_stage(),
        "processes": dist.get_world_size(engine.data_parallel_group),
        "gathered": [p.ds_persist for p in params] if stage == 3 else [],
        "subgroups": len(engine.optimizer.fp16_groups) if stage == 3 else 0,
    }
    return Engine(
        engine,
        optimizer,
        None,
        gathered(lambda p: p.detach().clone()),
        backward=engine.backward,
        step=engine.step,
        masters=None if engine.optimizer is optimizer else gathered(master),
        dtype=engine.get_data_types()[0],
        facts=facts | facts_of(optimizer, params),
    )


def facts_of(optimizer: Extrapolated, params: list[nn.Parameter]) -> dict[str, Any]:
    moved = optimizer.engine.params()
    return {
        "engine": type(optimizer.engine).__name__,
        "moves_shards": all(isinstance(p, DTensor) for p in moved),
        "held": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in moved),
        "elements": sum(getattr(p, "ds_numel", p.numel()) for p in params),
    }
