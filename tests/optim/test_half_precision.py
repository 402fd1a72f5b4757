"""Parameters in float16 and bfloat16: y is the textbook's, rounded once, also where a factor exceeds the range."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.config import PRESETS, Scaling
from tests.support.measuring import Pass, Step
from tests.support.plain_loop import values

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


@pytest.mark.parametrize("swap", [True, False])
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
