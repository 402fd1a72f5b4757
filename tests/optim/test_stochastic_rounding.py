"""bfloat16 has eight bits: displacements below half of its last one must not vanish, and must be right on average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.displacement import stochastic_round
from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.plain_loop import identical, values

N = 1 << 16
ULP = 2.0**-7  # of bfloat16 in [1, 2)


def displaced(
    x: float, move: float, *, dtype: torch.dtype = torch.bfloat16, workers: int = 1, **fields: int
) -> list[nn.Parameter]:
    """N parameters at x, asked to move by −move: y by worker."""
    w = nn.Parameter(torch.full((N,), x, dtype=dtype))
    config = ExtrapConfig.preset("extrap", scaling="none", step_size=abs(move), anneal=False, **fields)
    optimizer = Extrapolated(torch.optim.SGD([w], lr=0.1), config, virtual_workers=workers)
    ys = []
    for k in range(workers):
        with optimizer.probing(worker=k):
            (w * math.copysign(1.0, move) / workers).sum().backward()
        optimizer.train(worker=k)
        ys += values([w])
    optimizer.eval()
    assert identical([w], [torch.full((N,), x, dtype=dtype)])
    return ys


@pytest.mark.parametrize("share", [0.01, 0.125, 0.49, 0.5, 0.9, 1.3])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("x", [1.5, -1.5, 96.0, 0.0078125 * 1.5])
def test_the_expectation_is_exact(x: float, sign: int, share: float) -> None:
    """E[y] = x − ηd: of N independent roundings the mean is off by less than five standard deviations."""
    ulp = ULP * 2.0 ** math.floor(math.log2(abs(x)))
    (y,) = displaced(x, sign * share * ulp)
    below = share % 1
    deviation = ulp * math.sqrt(below * (1 - below) / N)
    assert abs(float(y.double().mean()) - (x - sign * share * ulp)) < 5 * deviation + 1e-6 * abs(x)


@pytest.mark.parametrize("share", [0.125, 0.49, 1.3])
def test_only_the_two_neighbours_are_taken(share: float) -> None:
    (y,) = displaced(1.5, share * ULP)
    low, high = 1.5 - math.ceil(share) * ULP, 1.5 - math.floor(share) * ULP
    assert sorted(set(y.tolist())) == [low, high]
    taken = float((y == low).double().mean())
    assert taken == pytest.approx(share % 1, abs=5 * math.sqrt(0.25 / N))


def test_less_than_half_an_ulp_does_not_vanish() -> None:
    """Rounding to nearest would leave every one of them where it was."""
    move = 0.1 * ULP
    assert torch.tensor(1.5 - move).bfloat16().item() == 1.5
    (y,) = displaced(1.5, move)
    assert 0.09 * N < int((y != 1.5).sum()) < 0.11 * N


def test_what_bfloat16_can_hold_is_not_rounded() -> None:
    (y,) = displaced(1.5, 3 * ULP)
    assert torch.equal(y, torch.full((N,), 1.5 - 3 * ULP, dtype=torch.bfloat16))


def test_wider_parameters_are_not_rounded_at_random() -> None:
    (y,) = displaced(1.5, 0.1 * ULP, dtype=torch.float32)
    assert torch.equal(y, torch.full((N,), 1.5 - 0.1 * ULP))


def test_it_is_seeded() -> None:
    (first,) = displaced(1.5, 0.5 * ULP, seed=3)
    (again,) = displaced(1.5, 0.5 * ULP, seed=3)
    (other,) = displaced(1.5, 0.5 * ULP, seed=4)
    assert torch.equal(first, again)
    assert float((first == other).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_it_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    displaced(1.5, 0.5 * ULP)
    assert torch.equal(torch.rand(4), expected)


def test_workers_and_steps_round_independently() -> None:
    a, b = displaced(1.5, 0.5 * ULP, workers=2)
    assert float((a == b).double().mean()) == pytest.approx(0.5, abs=0.02)

    w = nn.Parameter(torch.full((N,), 1.5, dtype=torch.bfloat16))
    config = ExtrapConfig.preset("extrap", scaling="none", step_size=0.5 * ULP, anneal=False)
    optimizer = Extrapolated(torch.optim.SGD([w], lr=0.0), config)
    ys = []
    for _ in range(2):
        with optimizer.probing():
            w.sum().backward()
        optimizer.train()
        ys += values([w])
        w.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float((ys[0] == ys[1]).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_a_second_visit_finds_the_same_y() -> None:
    w = nn.Parameter(torch.full((N,), 1.5, dtype=torch.bfloat16))
    optimizer = Extrapolated(
        torch.optim.SGD([w], lr=0.1), ExtrapConfig.preset("extrap", scaling="none", step_size=0.3 * ULP)
    )
    with optimizer.probing():
        w.sum().backward()
    optimizer.train()
    y = values([w])
    optimizer.train()
    assert identical([w], y)
    optimizer.eval()
    optimizer.train()
    assert identical([w], y)


def test_the_ends_of_the_range() -> None:
    """Infinities, NaN, zeros and the smallest and largest numbers come out as they went in."""
    tiny, huge = torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max
    wide = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, tiny, -tiny, huge, -huge])
    rounded = stochastic_round(wide.clone(), torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.float().nan_to_num(nan=7.0), wide.nan_to_num(nan=7.0))
