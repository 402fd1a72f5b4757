"""Counts what two processes communicate in one step, by engine and preset."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.lab.counting import CollectiveCounter
from hf_extrap.lab.scale import PRESETS
from tests.support.leaving import leave


def make(engine: str, preset: str) -> tuple[Any, Any, Extrapolated]:
    """What is called and passed backward, what steps, and the wrapper."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    config = ExtrapConfig.preset(preset, **({"scope": "global", "scaling": "none"} if engine == "zero3" else {}))
    if engine in ("zero3", "hsdp"):
        shape, names = ((2,), ("shards",)) if engine == "zero3" else ((2, 2), ("replicas", "shards"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model:  # type: ignore[attr-defined]
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    elif engine == "ddp":
        model = DistributedDataParallel(model)
    optimizer = Extrapolated(torch.optim.AdamW(model.parameters(), lr=0.01), config)
    if not engine.startswith("zero") or engine == "zero3":
        optimizer.connect(model)
        return model, optimizer, optimizer
    import deepspeed

    from tests.support import cpu_deepspeed  # noqa: F401

    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": int(engine[-1])},
    }
    prepared, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    optimizer.connect(prepared)
    return prepared, prepared, optimizer


def steps(engine: str, preset: str) -> Iterator[CollectiveCounter]:
    """One counter a step."""
    model, stepper, optimizer = make(engine, preset)
    for _ in range(4):
        with CollectiveCounter() as counter:
            if optimizer.wants_probe:
                with optimizer.probing(model=model) as backward:
                    backward(model(torch.randn(4, 6)).square().mean())
            optimizer.train()
            loss = model(torch.randn(4, 6)).square().mean()
            model.backward(loss) if stepper is model else loss.backward()
            stepper.step()
            if stepper is not model:
                optimizer.zero_grad()
        yield counter


def main() -> None:
    """Print the counts of the last step, after buckets have found their order, as JSON by engine and preset."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    counted = {}
    for engine in sys.argv[1:]:
        for preset in PRESETS:
            if engine == "zero3" and preset in ("extrap", "extrap-past"):
                continue
            *_, last = steps(engine, preset)
            counted[f"{engine} {preset}"] = dict(last.sizes)
    if dist.get_rank() == 0:
        print("COUNTED", json.dumps(counted), flush=True)
    leave()


if __name__ == "__main__":
    main()
