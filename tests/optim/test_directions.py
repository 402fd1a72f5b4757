"""S(d, x) against its formulas, and the noise against its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_extrap.optim import scaling as scalings
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.directions.noise import noise
from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.reference import scaled
from tests.support.plain_loop import distance, identical

SCALINGS = ["none", "norm", "layer", "filter", "adaptive", "step", "layer_step"]


def example(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """A direction and parameters: a convolution, a matrix, a vector and a number."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 3, 2, 2), (3, 5), (6,), ()]
    return tuple([torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in "dx")


def scale_direction(scaling: str, direction: list[Tensor], x: list[Tensor], last: Tensor | None = None) -> list[Tensor]:
    """S(d, x), multiplied out."""
    moves, factors = scalings.SCALINGS[scaling](direction, x, last)
    return moves if factors is None else [m.to(f.dtype) * f for m, f in zip(moves, factors, strict=True)]


def test_norm_is_of_length_one_over_all_parameters() -> None:
    d, x = example()
    length = math.sqrt(sum(float((v**2).sum()) for v in d))
    assert distance(scale_direction("norm", d, x), [v / length for v in d]) < 1e-15


def test_layer_gives_each_tensor_the_length_of_its_weights() -> None:
    d, x = example()
    for s, v, p in zip(scale_direction("layer", d, x), d, x, strict=True):
        assert torch.allclose(s, p.norm() * v / v.norm(), rtol=1e-14)
        assert s.norm().item() == pytest.approx(p.norm().item(), rel=1e-14)


def test_filter_gives_each_slice_the_length_of_its_weights() -> None:
    d, x = example()
    convolution, matrix, vector, number = scale_direction("filter", d, x)
    for s, v, p in ((convolution, d[0], x[0]), (matrix, d[1], x[1])):
        for i in range(len(s)):
            assert torch.allclose(s[i], p[i].norm() * v[i] / v[i].norm(), rtol=1e-14)
    assert torch.allclose(vector, x[2].norm() * d[2] / d[2].norm(), rtol=1e-14)
    assert number.item() == pytest.approx(math.copysign(abs(float(x[3])), float(d[3])))


def test_adaptive_weighs_by_the_squared_weights() -> None:
    d, x = example()
    length = math.sqrt(sum(float(((p.abs() * v) ** 2).sum()) for v, p in zip(d, x, strict=True)))
    expected = [p.abs() ** 2 * v / length for v, p in zip(d, x, strict=True)]
    assert distance(scale_direction("adaptive", d, x), expected) < 1e-14


def test_step_gives_the_direction_the_length_of_the_last_step() -> None:
    d, x = example()
    step = [torch.full_like(p, 0.1 * i) for i, p in enumerate(x)]
    lengths = torch.stack([s.norm() for s in step])
    found = scale_direction("step", d, x, lengths)
    factor = math.sqrt(sum(float((s**2).sum()) for s in step) / sum(float((v**2).sum()) for v in d))
    assert distance(found, [factor * v for v in d]) < 1e-14
    for s, v, length in zip(scale_direction("layer_step", d, x, lengths), d, lengths, strict=True):
        assert torch.allclose(s, length * v / v.norm(), rtol=1e-14)


def test_none_is_the_direction() -> None:
    d, x = example()
    assert identical(scale_direction("none", d, x), d)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scalings_are_the_reference(scaling: str, dtype: torch.dtype, tolerance: float) -> None:
    d, x = example(dtype)
    step = [0.1 * p.double().abs() + 0.01 for p in x]
    exact = scaled(scaling, [v.double() for v in d], [p.double() for p in x], step)
    lengths = torch.stack([s.norm() for s in step])
    assert distance(scale_direction(scaling, d, x, lengths), exact) < tolerance


@pytest.mark.parametrize("scaling", SCALINGS)
def test_no_direction_is_no_displacement(scaling: str) -> None:
    d, x = example()
    d = [torch.zeros_like(v) for v in d]
    assert identical(scale_direction(scaling, d, x, torch.ones(len(x))), d)
    assert identical(scaled(scaling, d, x, x), d)


@pytest.mark.parametrize("scaling", ["layer", "filter"])
def test_one_silent_filter_stays_where_it_is(scaling: str) -> None:
    d, x = example()
    d[1][1] = 0
    d[2].zero_()
    for s in (scale_direction(scaling, d, x), scaled(scaling, d, x)):
        assert not s[1][1].any() and not s[2].any()
        assert all(torch.isfinite(v).all() for v in s)


@pytest.mark.parametrize("scaling", [scaling for scaling in SCALINGS if scaling != "none"])
def test_scaled_directions_do_not_know_the_unit_of_the_gradient(scaling: str) -> None:
    d, x = example()
    lengths = torch.ones(len(x), dtype=torch.float64)
    larger = scale_direction(scaling, [1000 * v for v in d], x, lengths)
    assert distance(larger, scale_direction(scaling, d, x, lengths)) < 1e-13


@pytest.mark.parametrize(("kind", "variance", "fourth"), [("gaussian", 1.0, 3.0), ("uniform", 1 / 3, 1 / 5)])
def test_noise_has_its_moments(kind: str, variance: float, fourth: float) -> None:
    (drawn,) = noise(kind, [torch.zeros(400, 500)], seed=0, step=0, worker=0)
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)
    assert (drawn**2).mean().item() == pytest.approx(variance, rel=0.02)
    assert (drawn**4).mean().item() == pytest.approx(fourth, rel=0.04)
    assert (drawn.abs().max() <= 1) == (kind == "uniform")


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_noise_depends_on_seed_step_worker_and_parameter(kind: str) -> None:
    params = [torch.zeros(3, 4), torch.zeros(3, 4)]
    first = noise(kind, params, seed=1, step=2, worker=3)
    assert identical(first, noise(kind, params, seed=1, step=2, worker=3))
    others = [
        {"seed": 0, "step": 2, "worker": 3},
        {"seed": 1, "step": 3, "worker": 3},
        {"seed": 1, "step": 2, "worker": 2},
    ]
    for key in [*others, {"seed": 3, "step": 2, "worker": 1}]:
        assert distance(first, noise(kind, params, **key)) > 0.1
    assert distance(first[:1], first[1:]) > 0.1


def test_noise_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    noise("gaussian", [torch.zeros(10)], seed=0, step=0, worker=0)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("preset", "kind"), [("gaussian", "gaussian"), ("smoothout", "uniform")])
def test_noise_presets_move_by_the_scaled_noise(preset: str, kind: str) -> None:
    """A tensor moves by η ‖x‖ for `layer`, and each of its filters by that share of its own length for `filter`."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4, dtype=torch.float64)
    weight = model.weight.detach().clone()
    optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=0.1), ExtrapConfig.preset(preset, step_size=0.05))
    optimizer.train()
    move = weight - model.weight.detach()
    if kind == "gaussian":
        assert move.norm().item() == pytest.approx(0.05 * weight.norm().item(), rel=1e-6)
    else:
        assert (move.norm(dim=1) / weight.norm(dim=1)).tolist() == pytest.approx([0.05] * 4, rel=1e-6)
    assert move.abs().min() > 0


def test_msam_is_momentum_sam() -> None:
    """y = x + ρ Δx / ‖Δx‖ along the last update, with ρ fixed while the learning rate decays (arXiv:2401.12033)."""
    curvatures, rho = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64), 0.3
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64))
    optimizer = Extrapolated(torch.optim.SGD([p], lr=0.1, momentum=0.9), ExtrapConfig.preset("msam"))
    x, v = p.detach().clone(), torch.zeros(3, dtype=torch.float64)
    for step in range(20):
        rate = optimizer.param_groups[0]["lr"] = 0.1 * 0.8**step
        optimizer.train()
        y = x - rho * v / v.norm() if step else x
        assert distance([p.detach()], [y]) < 1e-14
        (curvatures * p.square()).sum().div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
        v = 0.9 * v + curvatures * y
        x = x - rate * v
        assert distance([p.detach()], [x]) < 1e-14
