"""Parameters in float16 and bfloat16: y is the textbook's, and bfloat16 rounds it at random to the right mean."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.config import PRESETS, Scaling
from hf_extrap.optim.displacement import stochastic_round
from tests.support.measuring import Pass, Step
from tests.support.plain_loop import identical, take_passes, take_step, values

SCHEMES = {name: ExtrapConfig.preset(name) for name in PRESETS if name != "none"} | {
    f"{scaling}, {preset}": ExtrapConfig.preset(preset, scaling=scaling, step_size=0.1)
    for scaling in get_args(Scaling)
    for preset in ("extrap", "extrap-past")
}


def loss(params: list[Tensor], slope: float, step: int) -> Tensor:
    """Linear, with gradients of up to `slope`, that passes in any type."""
    generator = torch.Generator().manual_seed(step)
    rises = [(torch.rand(p.shape, generator=generator) * 2 - 1) * slope for p in params]
    return sum(((p * rise.to(p)).sum() for p, rise in zip(params, rises, strict=True)), torch.zeros(()))


@pytest.mark.parametrize("swap", [True, pytest.param(False, marks=pytest.mark.matrix)])
@pytest.mark.parametrize(("slope", "rate"), [(1e-5, 1e4), (1.0, 0.1), (6e4, 5.5e-8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_y_is_the_textbooks(scheme: str, dtype: torch.dtype, slope: float, rate: float, swap: bool) -> None:
    """With gradients of 1e-5 and weights of 10 the factor of `layer` is 2e6, and with 6e4 the last
    update over the learning rate exceeds 65504: float16 can hold neither."""
    torch.manual_seed(0)
    params = [nn.Parameter((10 * torch.randn(shape)).to(dtype)) for shape in ((4, 6), (5,))]
    config = ExtrapConfig.from_dict({**SCHEMES[scheme].to_dict(), "swap": swap})
    optimizer = Extrapolated(torch.optim.SGD(params, lr=rate), config)
    before: Step | None = None
    for number in range(3):
        step = Step(values(params), [rate] * 2, [rate] * 2, [], number=number, before=before)
        for point in ("x", "y") if optimizer.wants_probe else ("y",):
            with optimizer.probing() if point == "x" else torch.enable_grad():
                if point == "y":
                    optimizer.train()
                step.passes.append(Pass(values(params)))
                for p in params:
                    p.grad = None
                loss(params, slope, number).backward()
                step.passes[-1].gradient = {i: p.grad.clone() for i, p in enumerate(params) if p.grad is not None}
        places = torch.finfo(dtype).eps
        for x, y, move in zip(step.x, step.y.at, step.asked(config), strict=True):
            target = x.double() + move
            # One place of y, which bfloat16 rounds up or down at random, and the rounding of d and of the last step.
            bound = places * (target.abs() + 4 * move.abs()) + torch.finfo(dtype).smallest_normal * places
            bound += places * x.double().abs().max() * (config.is_past or config.scales_by_step) * 0.1
            assert torch.isfinite(y).all(), f"step {number}"
            assert float(((y.double() - target).abs() - bound).max()) <= 0, f"step {number}"
        optimizer.step()
        optimizer.zero_grad()
        before = step
    assert optimizer.step_count == 3 and optimizer.skipped_steps == 0


def test_a_narrow_direction_does_not_decide_whether_to_step() -> None:
    """A gradient that float32 holds and a float16 direction does not: the averaged gradient is finite, so x steps.

    A rank that skipped by its own direction would make replicas differ.
    """
    w = nn.Parameter(torch.ones(2))
    config = ExtrapConfig.preset("extrap-past", scaling="none", step_size=1e-6, direction_dtype="float16")
    optimizer = Extrapolated(torch.optim.SGD([w], lr=1e-6), config)
    for _ in range(2):
        take_step(optimizer, lambda: (1e5 * w).sum().backward())
    assert optimizer.skipped_steps == 0
    assert w.tolist() == pytest.approx([0.8, 0.8], rel=1e-5)


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


@pytest.mark.parametrize("share", [0.1, 0.125, 0.49, 1.3, 3])
def test_y_is_one_of_the_two_neighbours(share: float) -> None:
    """Rounding to nearest would not move less than half an ULP; a number of bfloat16 is not rounded."""
    (y,) = displaced(1.5, share * ULP)
    low, high = 1.5 - math.ceil(share) * ULP, 1.5 - math.floor(share) * ULP
    assert sorted(set(y.tolist())) == sorted({low, high})
    assert share == 3 or float((y == low).double().mean()) == pytest.approx(share % 1, abs=5 * math.sqrt(0.25 / N))


def test_wider_parameters_are_not_rounded_at_random() -> None:
    (y,) = displaced(1.5, 0.1 * ULP, dtype=torch.float32)
    assert torch.equal(y, torch.full((N,), 1.5 - 0.1 * ULP))


def test_rounding_depends_on_the_seed_and_not_on_the_global_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    (first,), (again,), (other,) = (displaced(1.5, 0.5 * ULP, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first, again)
    assert float((first == other).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_workers_and_steps_round_independently() -> None:
    a, b = displaced(1.5, 0.5 * ULP, workers=2)
    assert float((a == b).double().mean()) == pytest.approx(0.5, abs=0.02)

    w = nn.Parameter(torch.full((N,), 1.5, dtype=torch.bfloat16))
    config = ExtrapConfig.preset("extrap", scaling="none", step_size=0.5 * ULP, anneal=False)
    optimizer = Extrapolated(torch.optim.SGD([w], lr=0.0), config)
    ys: list[torch.Tensor] = []
    for _ in range(2):
        take_passes(optimizer, lambda *_: w.sum().backward(), at_y=lambda _: ys.extend(values([w])))
        optimizer.step()
        optimizer.zero_grad()
    assert float((ys[0] == ys[1]).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_the_ends_of_the_range() -> None:
    """Infinities, NaN, zeros and the smallest and largest numbers come out as they went in."""
    tiny, huge = torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max
    wide = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, tiny, -tiny, huge, -huge])
    rounded = stochastic_round(wide.clone(), torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.float().nan_to_num(nan=7.0), wide.nan_to_num(nan=7.0))
