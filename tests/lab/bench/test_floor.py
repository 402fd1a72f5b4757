"""The formulas of the floor against the operations that a step really runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.lab.bench.floor import BASES, copy_bandwidth, floor_of, moved
from hf_extrap.lab.bench.workloads import GivenGradients
from hf_extrap.optim.config import PRESETS

SIZE = 4096


class TrafficCounter(TorchDispatchMode):
    """Counts the elements that operations read and write, of tensors as large as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        names = [a.name for a in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if views or func._schema.name in ("aten::empty_like", "aten::new_zeros", "aten::detach"):
            return result
        for name, value in given.items():
            size = _size(value)
            reads = name not in written or ("out" not in name and "copy_" not in func._schema.name)
            self.elements += size * ((name in written) + reads)
        if not written:
            self.elements += _size(result)
        return result


def _size(value: Any) -> int:
    return sum(t.numel() for t in tree_leaves(value) if isinstance(t, Tensor) and t.numel() >= SIZE)


def counted(config: ExtrapConfig, workers: int = 1) -> float:
    params = [nn.Parameter(torch.randn(64, 64)) for _ in range(3)]
    optimizer = Extrapolated(torch.optim.SGD(params, lr=0.1), config, virtual_workers=workers)
    gradients = [torch.ones_like(p) for p in params]

    def backward() -> None:
        # Gradients arrive without a copy, so that only the optimizer's traffic is counted.
        GivenGradients.apply(gradients, *params).backward()

    def step() -> None:
        if not config.is_local and optimizer.wants_probe:
            with optimizer.probing():
                backward()
        for worker in range(workers):
            if optimizer.wants_probe:
                with optimizer.probing(worker=worker):
                    backward()
            optimizer.train(worker=worker)
            backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        with TrafficCounter() as counter:
            step()
    return counter.elements // SIZE / 3


@pytest.mark.parametrize(("swap", "workers"), [(True, 1), (False, 1), (True, 3)])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("smoothout", "asam")])
def test_a_step_moves_what_the_formulas_say(preset: str, swap: bool, workers: int) -> None:
    config = ExtrapConfig.preset(preset, swap=swap)
    stock = counted(ExtrapConfig(), workers)
    assert counted(config, workers) - stock == pytest.approx(moved(config, swap, workers))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_floor_is_below(preset: str, workers: int) -> None:
    config = ExtrapConfig.preset(preset)
    assert moved(config, workers=workers) >= floor_of(config, workers)


@pytest.mark.parametrize("base", BASES)
def test_the_base_moves_its_states(base: str) -> None:
    param = nn.Parameter(torch.randn(64, 64))
    param.grad = torch.ones_like(param)
    momentum = {"momentum": 0.9, "nesterov": True} if base == "nesterov" else {}
    kind = torch.optim.AdamW if base == "adamw" else torch.optim.SGD
    optimizer = kind([param], lr=0.1, fused=True, **momentum)
    for _ in range(2):
        with TrafficCounter() as counter:
            optimizer.step()
    # The kernels declare that they write the gradient, which they do with a GradScaler alone.
    assert counter.elements / SIZE == BASES[base] + 1


def test_bandwidth_is_that_of_a_copy() -> None:
    assert 1e8 < copy_bandwidth(torch.device("cpu"), size=1 << 20, rounds=3) < 1e13
