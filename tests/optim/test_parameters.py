"""Groups and parameters that come, go, freeze and lack gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.reference import extrapolate
from tests.support.plain_loop import (
    BASES,
    CELLS,
    PRESETS,
    distance,
    identical,
    make_batch,
    make_model,
    run_plain_loop,
    sgd,
    take_passes,
    values,
)


class TwoHeads(nn.Module):
    """A body and two heads, of which a batch uses one: the other gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.heads = nn.Linear(5, 4), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.double()

    def forward(self, inputs: Tensor, head: int) -> Tensor:
        return self.heads[head](torch.tanh(self.body(inputs)))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("name", [n for n in CELLS if not n.endswith(("independent", "clipped"))])
def test_parameters_without_a_gradient(name: str, workers: int, base: str) -> None:
    """Worker k uses head (t // 2 + k) mod 2; the other has no direction of this worker, and no step if all agree."""
    model, config = TwoHeads(), CELLS[name].config
    names, K = [n for n, _ in model.named_parameters()], workers

    def loss(outputs: Tensor, step: int, k: int) -> Tensor:
        return nn.functional.cross_entropy(outputs, make_batch(step, k)[1])

    def loss_of(k: int) -> object:
        twin = copy.deepcopy(model)

        def f(point: list[Tensor], t: int, probe: bool) -> Tensor:
            arguments = (make_batch(t, k)[0], (t // 2 + k) % 2)
            return loss(torch.func.functional_call(twin, dict(zip(names, point, strict=True)), arguments), t, k)

        return f

    textbook = extrapolate(list(model.parameters()), [loss_of(k) for k in range(K)], BASES[base], config, 7)  # type: ignore[misc]
    optimizer = Extrapolated(BASES[base](list(model.parameters())), config, virtual_workers=K)
    for t in range(7):

        def backward(k: int, index: int, probe: bool, t: int = t) -> None:
            (loss(model(make_batch(t, k)[0], (t // 2 + k) % 2), t, k) / K).backward()

        def check(k: int, t: int = t) -> None:
            assert distance(list(model.parameters()), textbook.y[t][k]) < 1e-11, f"y of worker {k} at step {t}"

        take_passes(optimizer, backward, at_y=check)
        optimizer.step()
        optimizer.zero_grad()
        assert distance(list(model.parameters()), textbook.x[t + 1]) < 1e-11, f"x after step {t}"


@pytest.mark.parametrize("preset", PRESETS)
def test_frozen_parameters_stay_and_unfrozen_ones_join(preset: str) -> None:
    model, config = make_model(), ExtrapConfig.preset(preset)
    frozen = list(model[0].parameters())
    for p in frozen:
        p.requires_grad_(False)
    optimizer = Extrapolated(sgd(list(model.parameters())), config)
    before = values(frozen)
    run = run_plain_loop(model, optimizer, config, [0], steps=4)
    assert identical(frozen, before)
    assert all(identical(y[:2], before) for ys in run.y for y in ys)
    assert distance(run.x[3][2:], run.y[3][0][2:]) > 1e-4
    for p in frozen:
        p.requires_grad_(True)
    run = run_plain_loop(model, optimizer, config, [0], first=4, steps=3)
    assert min(distance(run.x[2][:2], run.y[2][0][:2]), distance(run.x[2][2:], run.y[2][0][2:])) > 1e-4
    assert distance(run.x[0][:2], run.x[3][:2]) > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_a_group_added_later_joins(preset: str) -> None:
    """At once, or from its first step on where the direction or its length comes from the last step."""
    model, config = make_model(), ExtrapConfig.preset(preset)
    first, last = list(model[0].parameters()), list(model[2].parameters())
    optimizer = Extrapolated(torch.optim.SGD(first, lr=0.1, momentum=0.9), config)
    run_plain_loop(model, optimizer, config, [0], steps=3)
    optimizer.add_param_group({"params": last, "lr": 0.05})
    assert len(optimizer.param_groups) == 2
    before = values(last)
    run = run_plain_loop(model, optimizer, config, [0], first=3, steps=3)
    assert distance(before, last) > 1e-3
    assert (distance(run.x[0][2:], run.y[0][0][2:]) == 0) == (config.is_past or config.scales_by_step)
    assert min(distance(run.x[t][part], run.y[t][0][part]) for t in (1, 2) for part in (slice(2), slice(2, 4))) > 1e-4
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert identical(list(model.parameters()), run.x[-1])


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Extrapolated(torch.optim.SGD(embedding.parameters(), lr=0.1), ExtrapConfig.preset("extrap-past"))
    optimizer.train()
    with pytest.raises(RuntimeError, match="sparse=False"):
        embedding(torch.tensor([1, 2])).sum().backward()
