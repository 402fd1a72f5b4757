"""What peers send with DistributedDataParallel, and the table of all methods. `test_scale.py` counts the presets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_extrap.lab.bench.methods import EXTRA_ALL_REDUCES, METHODS, make
from hf_extrap.lab.bench.workloads import Made, Workload
from hf_extrap.lab.cost import PRESETS as PLANNED
from hf_extrap.lab.cost import communication
from hf_extrap.lab.counting import CollectiveCounter

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


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("method", ["base", *PEERS])
def test_gradients_that_are_averaged_are_those_of_the_table(method: str) -> None:
    if method in PEERS:
        pytest.importorskip(PEERS[method], reason="needs the peer: pip install hf_extrap[bench]")
    made = Made(LINEAR, CPU)
    size = sum(p.numel() * p.element_size() for p in made.params)
    made.model = DistributedDataParallel(made.model)
    step, _ = make(method, made)
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
