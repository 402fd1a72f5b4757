"""S(d, x) against its formulas, directions in Adam's metric and of length zero, and noise against its distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim import scaling as scalings
from hf_extrap.optim.config import Scaling
from hf_extrap.optim.directions.noise import noise
from hf_extrap.optim.preconditioner import adam_preconditioner
from hf_extrap.optim.reference import scaled
from tests.support.plain_loop import (
    Cell,
    assert_same_run,
    distance,
    identical,
    make_model,
    run_plain_loop,
    run_reference,
    run_virtual_workers,
    take_step,
    values,
)


def example(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """A direction and parameters: a convolution, a matrix, a vector and a number."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(4, 3, 2, 2), (3, 5), (6,), ()]
    return tuple([torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in "dx")


def scale_direction(scaling: str, direction: list[Tensor], x: list[Tensor], last: Tensor | None = None) -> list[Tensor]:
    """S(d, x), multiplied out."""
    moves, factors = scalings.SCALINGS[scaling](direction, x, last)
    return moves if factors is None else [m.to(f.dtype) * f for m, f in zip(moves, factors, strict=True)]


def whole(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float((t**2).sum()) for t in tensors))


def by_filter(d: Tensor, x: Tensor) -> Tensor:
    """Each slice of a matrix or a convolution is a filter; a vector or a number is one."""
    if d.dim() < 2:
        return x.norm() * d / d.norm()
    return torch.stack([p.norm() * v / v.norm() for v, p in zip(d, x, strict=True)])


# By the direction d, the parameters x and the last step s, each a list of tensors.
FORMULAS: dict[str, Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]] = {
    "none": lambda d, x, s: d,
    "norm": lambda d, x, s: [v / whole(d) for v in d],
    "layer": lambda d, x, s: [p.norm() * v / v.norm() for v, p in zip(d, x, strict=True)],
    "filter": lambda d, x, s: [by_filter(v, p) for v, p in zip(d, x, strict=True)],
    "adaptive": lambda d, x, s: [
        p.abs() ** 2 * v / whole([q.abs() * w for w, q in zip(d, x, strict=True)]) for v, p in zip(d, x, strict=True)
    ],
    "step": lambda d, x, s: [whole(s) / whole(d) * v for v in d],
    "layer_step": lambda d, x, s: [last.norm() * v / v.norm() for v, last in zip(d, s, strict=True)],
}
SCALINGS = list(FORMULAS)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scalings_are_their_formulas(scaling: str, dtype: torch.dtype, tolerance: float) -> None:
    """The package's, and the textbook's in float64."""
    assert set(SCALINGS) == set(scalings.SCALINGS)
    d, x = example(dtype)
    wide, at = [v.double() for v in d], [p.double() for p in x]
    step = [0.1 * p.abs() + 0.01 for p in at]
    expected = FORMULAS[scaling](wide, at, step)
    lengths = torch.stack([s.norm() for s in step])
    assert distance(scale_direction(scaling, d, x, lengths), expected) < tolerance
    assert distance(scaled(scaling, wide, at, step), expected) < 1e-13


@pytest.mark.parametrize("scaling", [scaling for scaling in SCALINGS if scaling != "none"])
def test_scaled_directions_do_not_depend_on_the_unit_of_the_gradient(scaling: str) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("slope", [0.0, 1e-42, 1e-30])
@pytest.mark.parametrize("scaling", get_args(Scaling))
def test_y_is_finite_and_a_zero_direction_stays_at_x(scaling: str, slope: float, dtype: torch.dtype) -> None:
    """‖x‖ = 346 and a last step of length 346, from which on a division by the smallest float32 would be infinite."""
    flat, steep = (nn.Parameter(torch.full((3, 4), 100.0, dtype=dtype)) for _ in range(2))
    filters = torch.tensor([[1.0], [0.0], [2.0]], dtype=dtype)  # the middle one of `steep` has no direction either
    config = ExtrapConfig.preset("extrap", scaling=scaling, step_size=0.1, anneal=False)
    optimizer = Extrapolated(torch.optim.SGD([flat, steep], lr=1.0), config)
    take_step(optimizer, lambda: (-100 * flat.sum() - 100 * steep.sum()).backward())
    x, last = values([flat, steep]), torch.full_like(flat, -100.0).detach()
    with optimizer.probing():
        (slope * flat.sum() + (filters * steep).sum()).backward()
    optimizer.train()
    d = [torch.full_like(flat, slope).detach().double(), filters.expand(3, 4).double()]
    moves = scaled(scaling, d, [p.double() for p in x], [last.double()] * 2)
    assert all(torch.isfinite(p).all() for p in (flat, steep))
    assert torch.equal(steep[1], x[1][1])
    assert slope > 0 or torch.equal(flat, x[0])
    # Shorter than the square root of the smallest number, a length may be rounded to zero.
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert distance([steep], [x[1] - 0.1 * moves[1]]) <= tolerance * 200
    assert distance([flat], [x[0]]) <= 0.1 * float(moves[0].abs().max()) + tolerance * 200
    (slope * flat.sum() + steep.sum()).backward()
    optimizer.step()
    assert optimizer.step_count == 2 and optimizer.skipped_steps == 0


@pytest.mark.parametrize("preset", ["extrap", "extrap-past", "optimistic", "gaussian"])
@pytest.mark.parametrize("scaling", ["layer", "filter", "layer_step"])
def test_rows_of_an_embedding_that_no_token_uses(scaling: str, preset: str) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(50, 32)
    config = ExtrapConfig.preset(preset, scaling=scaling, step_size=0.05)
    optimizer = Extrapolated(torch.optim.SGD(table.parameters(), lr=0.5), config)
    x = values([table.weight])[0]
    for _ in range(6):
        take_step(optimizer, lambda: table(torch.tensor([1, 2, 3])).square().sum().backward())
    assert optimizer.step_count == 6 and optimizer.skipped_steps == 0
    assert torch.equal(table.weight[4:], x[4:]) and not torch.equal(table.weight[1:4], x[1:4])


@pytest.mark.parametrize("preset", ["extrap", "extrap-past", "extragradient", "optimistic", "past-update"])
@pytest.mark.parametrize("scaling", ["layer", "filter"])
def test_a_low_rank_pair_starts_to_train(scaling: str, preset: str) -> None:
    """With B = 0 as LoRA starts, A has a gradient of zeros."""
    torch.manual_seed(0)
    A, B = nn.Parameter(torch.randn(4, 40)), nn.Parameter(torch.zeros(20, 4))
    config = ExtrapConfig.preset(preset, scaling=scaling, step_size=0.05)
    optimizer = Extrapolated(torch.optim.SGD([A, B], lr=0.05), config)

    def loss() -> Tensor:
        return (B @ A @ torch.ones(40) - 1).square().mean()

    first = float(loss().detach())
    for _ in range(5):
        take_step(optimizer, lambda: loss().backward())
    assert optimizer.step_count == 5 and optimizer.skipped_steps == 0
    assert float(loss()) < 0.9 * first


SCHEMES = {
    "extrap": ExtrapConfig.preset("extrap", step_ratio=0.5, precondition=True),
    "extrap-past": ExtrapConfig.preset("extrap-past", step_ratio=0.5, precondition=True),
    "optimistic-step": ExtrapConfig.preset("optimistic", step_size=0.5, scaling="step", precondition=True),
    "extrap-auto": ExtrapConfig.preset("extrap", step_size="auto", precondition=True),
    "optimistic-auto": ExtrapConfig.preset("optimistic", step_size="auto", probe_every=3, precondition=True),
    "extrap-past-auto-capped": ExtrapConfig.preset(
        "extrap-past", step_size="auto", probe_every=3, precondition=True, max_displacement=0.2
    ),
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_preconditioned_schemes_are_the_textbook(scheme: str, clip: float | None) -> None:
    cell = Cell(SCHEMES[scheme], clip)
    run = run_virtual_workers(cell, "adamw", 2, torch.float64)
    assert_same_run(run, run_reference(cell, "adamw", 2, torch.float64), 1e-10)
    # It moves, and elsewhere than without the preconditioner.
    plain = run_virtual_workers(
        Cell(ExtrapConfig.from_dict({**cell.config.to_dict(), "precondition": False}), clip), "adamw", 2, torch.float64
    )
    assert max(distance(y, x) for x, ys in zip(run.x, run.y, strict=False) for y in ys) > 1e-4
    assert distance(run.x[-1], plain.x[-1]) > 1e-4


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_preconditioner_is_the_inverse_of_the_root_mean_square(amsgrad: bool) -> None:
    p = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([p], betas=(0.9, 0.5), eps=1e-2, amsgrad=amsgrad)
    assert adam_preconditioner(optimizer, [p]) == [None]
    for gradient in ([3.0, 0.1], [1.0, 0.4]):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    first = [0.5 * 9.0, 0.5 * 0.01]
    second = [0.5 * first[0] + 0.5 * 1.0, 0.5 * first[1] + 0.5 * 0.16]
    v = [max(a, b) for a, b in zip(first, second, strict=True)] if amsgrad else second
    expected = [1 / ((value / (1 - 0.5**2)) ** 0.5 + 1e-2) for value in v]
    found = adam_preconditioner(optimizer, [p])[0]
    assert found is not None and found.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_base_without_second_moments_is_refused() -> None:
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = Extrapolated(base, SCHEMES["extrap-past"])
    with pytest.raises(ValueError, match="precondition is true, but the base optimizer SGD keeps no exp_avg_sq"):
        run_plain_loop(model, optimizer, optimizer.config, [0], steps=2)
