"""Invariant 5: closed forms on quadratics, and the bilinear saddle where SGD diverges and extragradient converges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.reference import extrapolate
from tests.support.plain_loop import take_passes

CURVATURES = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.7, 1.1], dtype=torch.float64)

Quadratic = Callable[[Tensor], Tensor]


def quadratic(curvatures: Tensor) -> Quadratic:
    return lambda x: 0.5 * (curvatures * x**2).sum()


def descend(losses: list[Quadratic], config: ExtrapConfig, lr: float, steps: int, start: Tensor = START) -> Tensor:
    """The last iterate of SGD; the reference's is asserted to be the same."""
    K = len(losses)
    x = torch.nn.Parameter(start.clone())
    optimizer = Extrapolated(torch.optim.SGD([x], lr=lr), config, virtual_workers=K)
    for _ in range(steps):
        take_passes(optimizer, lambda k, index, probe: (losses[k](x) / K).backward())
        optimizer.step()
        optimizer.zero_grad()
    textbook = extrapolate(
        [start], [lambda p, t, probe, f=f: f(p[0]) for f in losses], lambda p: torch.optim.SGD(p, lr=lr), config, steps
    )
    torch.testing.assert_close(x.detach(), textbook.x[-1][0], rtol=1e-10, atol=1e-14)
    return x.detach()


def constant(preset: str, step_size: float | str, **overrides: object) -> ExtrapConfig:
    unscaled = {"scaling": "none"} if ExtrapConfig.preset(preset).scales_by_step else {}
    return ExtrapConfig.preset(preset, **{"step_size": step_size, "anneal": False, **unscaled, **overrides})


@pytest.mark.parametrize("preset", ["extrap", "extragradient"])
def test_fresh_gradient_damps_by_curvature(preset: str) -> None:
    """x_T = (1 − γλ(1 − ηλ))^T x_0."""
    lr, eta, steps = 0.5, 0.6, 25
    x = descend([quadratic(CURVATURES)], constant(preset, eta), lr, steps)
    expected = (1 - lr * CURVATURES * (1 - eta * CURVATURES)) ** steps * START
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=0)


def test_local_and_global_extragradient_of_two_workers() -> None:
    """Local: mean of A_k(1 − ηA_k). Global: Ā(1 − ηĀ). They differ by the variance of the curvatures."""
    lr, eta, steps = 0.4, 0.5, 20
    a, b = CURVATURES, CURVATURES.flip(0)
    losses = [quadratic(a), quadratic(b)]
    local = descend(losses, constant("extrap", eta), lr, steps)
    mean = (a * (1 - eta * a) + b * (1 - eta * b)) / 2
    torch.testing.assert_close(local, (1 - lr * mean) ** steps * START, rtol=1e-12, atol=0)
    shared = descend(losses, constant("extragradient", eta), lr, steps)
    average = (a + b) / 2
    torch.testing.assert_close(shared, (1 - lr * average * (1 - eta * average)) ** steps * START, rtol=1e-12, atol=0)


@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "past-update"])
def test_past_gradient_is_a_two_term_recursion(preset: str) -> None:
    """y_t = x_t − ηλ y_{t−1} with y_{−1} = 0, x_{t+1} = x_t − γλ y_t: powers of a 2 × 2 matrix by curvature.

    Without momentum the past update over the learning rate is the past gradient.
    """
    lr, eta, steps = 0.5, 0.4, 30
    x = descend([quadratic(CURVATURES)], constant(preset, eta), lr, steps)
    for value, start, curvature in zip(x.tolist(), START.tolist(), CURVATURES.tolist(), strict=True):
        step = np.array([[1 - lr * curvature, lr * eta * curvature**2], [1.0, -eta * curvature]])
        expected = (np.linalg.matrix_power(step, steps) @ [start, 0.0])[0]
        assert value == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("preset", ["sam", "asam"])
def test_sam_ascends_by_rho(preset: str) -> None:
    """y = x + ρ Ax / ‖Ax‖, and for ASAM y = x + ρ x² Ax / ‖|x| Ax‖."""
    lr, rho, steps = 0.5, 0.1, 12
    x = descend([quadratic(CURVATURES)], constant(preset, rho), lr, steps)
    expected, curvatures = START.numpy(), CURVATURES.numpy()
    for _ in range(steps):
        g, weight = curvatures * expected, np.abs(expected) if preset == "asam" else 1.0
        expected = expected - lr * curvatures * (expected + rho * weight**2 * g / np.linalg.norm(weight * g))
    assert x.numpy() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("lr", "stable"), [(3.9, True), (4.1, False)])
def test_half_a_curvature_doubles_the_stable_learning_rate(lr: float, stable: bool) -> None:
    """γ < 2 / ((1 − c) λ_max) with c = η λ_max = ½; alone, SGD diverges already from γ = 2 / λ_max on."""
    assert descend([quadratic(CURVATURES)], ExtrapConfig.preset("none"), 2.1, 200).norm() > 1e5
    x = descend([quadratic(CURVATURES)], constant("extrap", 0.5), lr, 200)
    assert (x.norm() < 0.1) if stable else (x.norm() > 1e3)


@pytest.mark.parametrize("preset", ["extrap", "extragradient"])
def test_auto_finds_the_curvature(preset: str) -> None:
    """f = λ/2 ‖x‖²: L̂ = λ from the first step on, so y = (1 − c) x from the second on, for any learning rate."""
    curvature, lr, c, steps = 4.0, 0.05, 0.3, 10
    x = descend([quadratic(curvature * torch.ones(6))], constant(preset, "auto", curvature_share=c), lr, steps)
    first = 1 - lr * curvature * (1 - 0.1 * lr * curvature)
    expected = first * (1 - lr * curvature * (1 - c)) ** (steps - 1) * START
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("preset", ["extrap-past", "optimistic"])
def test_auto_with_a_past_direction_probes_the_curvature(preset: str) -> None:
    """L̂ = λ from the probe of step 0 on; steps 4 and 8 probe again, the others have d = λ y_{t−1} and η = c / λ."""
    curvature, lr, c, steps = 4.0, 0.05, 0.3, 10
    config = constant(preset, "auto", curvature_share=c, probe_every=4)
    x = descend([quadratic(curvature * torch.ones(6))], config, lr, steps)
    scale, y = 1.0, 0.0
    for t in range(steps):
        eta = 0.1 * lr if t == 0 else c / curvature
        y = scale - eta * curvature * (scale if t % 4 == 0 else y)
        scale -= lr * curvature * y
    torch.testing.assert_close(x, scale * START, rtol=1e-10, atol=0)


@pytest.mark.parametrize("preset", ["extrap", "extrap-past"])
def test_a_narrow_direction_is_refused_where_the_curvature_is_measured(preset: str) -> None:
    """Two gradients that are each rounded to 8 bits differ by more than a short move between them explains."""
    with pytest.raises(ValueError, match="needs directions in full precision, not direction_dtype 'bfloat16'"):
        constant(preset, "auto", direction_dtype="bfloat16")


def rotate(u_and_v: Tensor) -> Tensor:
    """The field of min over u, max over v of uv: its gradient by autograd is (v, −u)."""
    u, v = u_and_v
    return u * v.detach() - u.detach() * v


# By step: the factor of (x_t, y_{t−1}) in complex numbers, where −γ times the field is a turn by iγ.
SADDLE = {
    "none": [[1 + 0.3j, 0], [1, 0]],
    **dict.fromkeys(("extrap", "extragradient"), [[1 + 0.3j * (1 + 0.3j), 0], [1, 0]]),
    **dict.fromkeys(("extrap-past", "optimistic", "past-update"), [[1 + 0.3j, 0.3j**2], [1, 0.3j]]),
}


@pytest.mark.parametrize("preset", SADDLE)
def test_sgd_diverges_and_extragradient_converges_on_the_bilinear_saddle(preset: str) -> None:
    """x ← x + iγ y; SGD: y = x; fresh: y = (1 + iγ) x; past: y_t = x_t + iγ y_{t−1}."""
    start = torch.tensor([1.0, 1.0], dtype=torch.float64)
    config = ExtrapConfig.preset(preset, **({} if preset == "none" else {"step_ratio": 1.0}))
    x = descend([rotate], config, 0.3, 200, start)
    expected = (np.linalg.matrix_power(np.array(SADDLE[preset]), 200) @ [1 + 1j, 0.0])[0]
    assert complex(*x.tolist()) == pytest.approx(expected, rel=1e-8)
    assert x.norm() > 1e3 if preset == "none" else x.norm() < 1e-3
