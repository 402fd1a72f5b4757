"""A direction of length zero moves nothing, whatever the scaling and however long the weights or the last step are."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.config import Scaling
from hf_extrap.optim.reference import scaled
from tests.support.plain_loop import distance, take_step, values


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
