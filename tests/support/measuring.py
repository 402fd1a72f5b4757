"""What the forward and backward passes of a run really saw, and what the scheme asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_extrap import ExtrapConfig
from hf_extrap.optim.directions.noise import noise
from hf_extrap.optim.reference import scaled
from tests.support.plain_loop import values

PRESETS = {
    "extrap": ExtrapConfig.preset("extrap", step_size=0.5),
    "extrap-past": ExtrapConfig.preset("extrap-past", step_size=0.5),
    "past-update": ExtrapConfig.preset("past-update"),
    "gaussian": ExtrapConfig.preset("gaussian"),
}

CHOSEN = ("extrap", "extrap-past")
"""A fresh and a past direction: `make test` runs these in every mode, and `make test-all` all presets."""
SHORT = {
    "extrap": ExtrapConfig.preset("extrap", step_size=0.004),
    "extrap-past": ExtrapConfig.preset("extrap-past", step_size=0.008),
    "past-update": ExtrapConfig.preset("past-update", step_ratio=0.008),
    "gaussian": ExtrapConfig.preset("gaussian", step_size=0.001),
}
"""Moves of which rounding bfloat16 parameters to the nearest numbers would undo a good part."""


@dataclass
class Pass:
    """One forward pass and its backward pass: the parameters, the loss, the gradient with its loss scale."""

    at: list[Tensor]
    loss: float = float("nan")
    gradient: dict[int, Tensor] = field(default_factory=dict)


class Watch:
    """Records every pass through hooks of its own.

    Args:
        params: those that are trained, in the optimizer's order.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.passes: list[Pass] = []
        for index, param in enumerate(self.params):
            param.register_hook(self._see(index))

    def _see(self, index: int) -> Callable[[Tensor], None]:
        def see(grad: Tensor) -> None:
            seen = self.passes[-1].gradient
            seen[index] = seen[index] + grad if index in seen else grad.clone()

        return see

    @contextmanager
    def forward(self) -> Iterator[Callable[[Tensor], None]]:
        """Around one forward pass; gives the function that records the loss."""
        self.passes.append(Pass(values(self.params)))
        yield lambda loss: setattr(self.passes[-1], "loss", float(loss.detach()))
        for p, q in zip(self.params, self.passes[-1].at, strict=True):
            assert torch.allclose(p, q, rtol=0, atol=0, equal_nan=True)


@dataclass
class Step:
    """One step: x before it, the rate of each parameter and the largest so far, what was passed."""

    x: list[Tensor]
    rates: list[float]
    peaks: list[float]
    passes: list[Pass]
    scale: float = 1.0  # of the loss, in the gradients
    number: int = 0  # of steps taken before
    before: Step | None = None  # None where a direction from the past is cold

    @property
    def y(self) -> Pass:
        return self.passes[-1]

    def asked(self, config: ExtrapConfig) -> list[Tensor]:
        """y − x in float64, from the textbook."""
        zeros = [torch.zeros_like(p, dtype=torch.float64) for p in self.x]
        wide = [p.double() for p in self.x]
        last = None
        if self.before is not None:
            last = [before.double() - p for before, p in zip(self.before.x, wide, strict=True)]
        d = zeros
        if config.is_fresh:
            d = [self.passes[0].gradient.get(i, zeros[i]).double() / self.scale for i in range(len(zeros))]
        elif config.is_noise:
            drawn = noise(config.direction, self.x, seed=config.seed, step=self.number, worker=0)
            d = [v.double() for v in drawn]
        elif self.before is not None and last is not None:
            gradient, scale = self.before.y.gradient, self.before.scale
            d = [gradient.get(i, zeros[i]).double() / scale for i in range(len(zeros))]
            if config.direction == "past_update":
                d = [v / rate for v, rate in zip(last, self.before.rates, strict=True)]
        moves = scaled(config.scaling, d, wide, last)
        sizes = [
            config.step_ratio * rate
            if config.step_ratio is not None
            else float(config.step_size or 0) * (rate / peak if config.anneals else 1)
            for rate, peak in zip(self.rates, self.peaks, strict=True)
        ]
        sign = 1 if config.ascent else -1
        return [sign * size * move for size, move in zip(sizes, moves, strict=True)]


def assert_displacements(steps: Sequence[Step], config: ExtrapConfig) -> float:
    """Every pass was at x, or at the y that was asked for.

    Parameters in float32 hold y to rounding. In bfloat16 each is one of the two neighbours of the y asked for, and the
    move in effect, Σ (y − x) · m / Σ m² with m the move asked for, is 1 within five standard deviations of what
    rounding at random leaves, which must be less than a half: a move that vanished, or was half as long, would show.

    Returns:
        These five standard deviations: the share of the moves that could be missing unseen.
    """
    effect = total = variance = 0.0
    for step in steps:
        assert len(step.passes) == 1 + config.is_fresh
        for seen in step.passes[:-1]:
            assert all(torch.equal(p, q) for p, q in zip(seen.at, step.x, strict=True))
        for x, y, move in zip(step.x, step.y.at, step.asked(config), strict=True):
            target = x.double() + move
            off = y.double() - target
            if x.dtype == torch.bfloat16:
                exponent = torch.floor(torch.log2(target.abs().clamp_min(2.0**-126)))
                place = torch.exp2(exponent - 7)  # the last one
                share = (target / place).remainder(1)
                # Beside the rounding at random, the length of the last step is that of a difference in bfloat16.
                assert bool((off.abs() <= place + 2.0**-10 * move.abs()).all())
                variance += float((move * place).square().mul(share * (1 - share)).sum())
            else:
                size = float(x.double().abs().max() + move.abs().max())
                assert float(off.abs().max()) <= 4 * torch.finfo(x.dtype).eps * size
            effect += float(((y.double() - x.double()) * move).sum())
            total += float(move.square().sum())
    assert total > 0
    noise_of_rounding = 5 * variance**0.5 / total
    assert noise_of_rounding < 0.5
    assert abs(effect / total - 1) < noise_of_rounding + 1e-3
    return noise_of_rounding


def assert_gradient_at(seen: Pass, clean: Callable[[list[Tensor]], Tensor], scale: float, tolerance: float) -> None:
    """A pass's loss and gradient are those of the parameters it began with.

    Args:
        seen: the pass.
        clean: the loss at a point, by a model that nothing has been done to.
        scale: of the loss in the gradient.
        tolerance: relative, of the loss and of the gradient as one vector.
    """
    leaves = [p.clone().requires_grad_() for p in seen.at]
    loss = clean(leaves)
    gradient = torch.autograd.grad(loss * scale, leaves, allow_unused=True)
    assert abs(float(loss) - seen.loss) <= tolerance * abs(float(loss))
    pairs = [(g, seen.gradient[i]) for i, g in enumerate(gradient) if g is not None]
    expected = torch.cat([g.double().reshape(-1) for g, _ in pairs])
    actual = torch.cat([g.double().reshape(-1) for _, g in pairs])
    assert float((actual - expected).norm() / expected.norm()) <= tolerance
