"""Directions in Adam's metric, against the textbook and by hand."""

from __future__ import annotations

import pytest
import torch

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.preconditioner import adam_preconditioner
from tests.support.plain_loop import (
    Cell,
    assert_same_run,
    distance,
    make_model,
    run_plain_loop,
    run_reference,
    run_virtual_workers,
)

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
