"""What methods send, counted where DistributedDataParallel runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.lab.bench.methods import EXTRA_ALL_REDUCES, METHODS, make
from hf_extrap.lab.bench.workloads import Made, Workload
from hf_extrap.lab.counting import CollectiveCounter
from hf_extrap.lab.scale import PRESETS as PLANNED
from hf_extrap.lab.scale import communication
from hf_extrap.optim.config import PRESETS

CPU = torch.device("cpu")
PEERS = {"pytorch_optimizer SAM": "pytorch_optimizer", "cooper extragradient": "cooper", "schedulefree": "schedulefree"}


def _loss(model: nn.Module, worker: int, share: float) -> Tensor:
    rows = torch.randn(max(1, round(4 * share)), 64, generator=torch.Generator().manual_seed(worker))
    loss: Tensor = model(rows).square().mean()
    return loss


LINEAR = Workload("a linear model", lambda: nn.Linear(64, 64, bias=False), _loss, "adamw")


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _in_ddp(method: str) -> tuple[Callable[[], object], int]:
    """A step of a method with DistributedDataParallel, and the bytes of a gradient."""
    made = Made(LINEAR, CPU)
    size = sum(p.numel() * p.element_size() for p in made.params)
    ddp = DistributedDataParallel(made.model)
    if method not in PRESETS:
        made.model = ddp
        return make(method, made)[0], size
    optimizer = Extrapolated(LINEAR.optimizer(made.params), ExtrapConfig.preset(method))

    def step() -> None:
        if optimizer.wants_probe:
            with optimizer.probing(model=ddp):
                _loss(ddp, 0, 1.0).backward()
        optimizer.train()
        _loss(ddp, 0, 1.0).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, size


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("method", ["base", *PRESETS, *PEERS])
def test_gradients_that_are_averaged_are_those_of_the_table(method: str) -> None:
    if method in PEERS:
        pytest.importorskip(PEERS[method], reason="needs the peer: pip install hf_extrap[bench]")
    step, size = _in_ddp(method)
    for _ in range(3):
        step()
    with CollectiveCounter() as counter:
        step()
    # Scalars, such as a norm or a flag, are a few bytes of 16 kB.
    assert sum(counter.sizes.values()) / size == pytest.approx(1 + EXTRA_ALL_REDUCES.get(method, 0), abs=0.01)


def test_the_table_is_that_of_the_plan_at_scale() -> None:
    for preset in PLANNED:
        _, added = communication("ddp", preset, 100, 8)
        assert len(added) == EXTRA_ALL_REDUCES.get(preset, 0)
    assert set(EXTRA_ALL_REDUCES) <= set(METHODS)


def test_none_takes_the_steps_of_the_base() -> None:
    ends = []
    for method in ("base", "none"):
        made = Made(LINEAR, CPU)
        step, _ = make(method, made)
        for _ in range(5):
            step()
        ends.append(torch.cat([p.detach().flatten() for p in made.params]))
    assert torch.equal(*ends)
