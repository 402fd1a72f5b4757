"""FSDP2's sharded parameters, with one process: local scope is refused, global scope trains as without shards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import take_step


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_model(sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def make_optimizer(model: nn.Module, preset: str) -> Extrapolated:
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    name, _, scaling = preset.partition(":")
    fields = {"scaling": scaling, "step_size": 0.5} if scaling else {}
    return Extrapolated(base, ExtrapConfig.preset(name, **fields))


@pytest.mark.parametrize("preset", ["extrap", "extrap-past", "sam"])
def test_local_scope_is_refused_with_what_works_instead(preset: str) -> None:
    with pytest.raises(ValueError, match="scope is 'local', but the parameters are sharded .* allowed: scope 'global'"):
        make_optimizer(make_model(sharded=True), preset)


@pytest.mark.parametrize(
    "preset", ["none", "optimistic", "extragradient", "past-update", "optimistic:step", "optimistic:layer_step"]
)
def test_global_scope_trains_as_without_shards(preset: str) -> None:
    ends = []
    for sharded in (False, True):
        model = make_model(sharded)
        optimizer = make_optimizer(model, preset)
        optimizer.connect(model)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            batch = torch.randn(16, 4, generator=generator)

            def backward(batch: torch.Tensor = batch, model: nn.Module = model) -> None:
                (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()

            take_step(optimizer, backward)
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        ends.append(torch.cat([p.detach().reshape(-1) for p in whole]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
