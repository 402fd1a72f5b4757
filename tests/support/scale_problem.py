"""What processes communicate in one step, by engine and preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.lab.cost import PRESETS
from hf_extrap.lab.counting import CollectiveCounter


def count_step(engine: str, preset: str) -> CollectiveCounter:
    """The collectives of the fourth step, after buckets have found their order."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    config = ExtrapConfig.preset(preset, **({"scope": "global", "scaling": "none"} if engine == "zero3" else {}))
    if engine in ("zero3", "hsdp"):
        shape, names = ((2,), ("shards",)) if engine == "zero3" else ((2, 2), ("replicas", "shards"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for module in (*model, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    elif engine == "ddp":
        model = DistributedDataParallel(model)
    optimizer = Extrapolated(torch.optim.AdamW(model.parameters(), lr=0.01), config)
    by_deepspeed = engine in ("zero1", "zero2")
    if by_deepspeed:
        from tests.support import cpu_deepspeed  # noqa: F401

        # isort: split
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        settings |= {"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": int(engine[-1])}}
        model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    optimizer.connect(model)
    for _ in range(4):
        with CollectiveCounter() as counter:
            if optimizer.wants_probe:
                with optimizer.probing(model=model) as backward:
                    backward(model(torch.randn(4, 6)).square().mean())
            optimizer.train()
            loss = model(torch.randn(4, 6)).square().mean()
            if by_deepspeed:
                model.backward(loss)
                model.step()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return counter


def in_processes(folder: Path, *engines: str) -> dict[str, dict[str, int]]:
    dist.init_process_group("gloo")
    return {
        f"{engine} {preset}": dict(count_step(engine, preset).sizes)
        for engine in engines
        for preset in PRESETS
        if engine != "zero3" or preset not in ("extrap", "extrap-past")
    }
