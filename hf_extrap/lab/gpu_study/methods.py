"""The methods of the study by name: a base optimizer and a scheme of extrapolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from hf_extrap.optim.config import ExtrapConfig

from .slot import Slot

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4


class Lars(SGD):
    """SGD with heavy-ball momentum whose gradient has, for each tensor, the length of its weights times `trust`.

    Biases and BatchNorm's parameters take their gradients as they are, without weight decay.

    Args:
        slot: whose flat parameter is stepped.
        lr: learning rate.
        trust: length of a tensor's gradient in units of the length of its weights.

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017.
    """

    def __init__(self, slot: Slot, lr: float, trust: float = 1e-3) -> None:
        super().__init__([slot.flat], lr=lr, momentum=MOMENTUM)
        self._slot, self._trust = slot, trust

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Scale the gradients, then step as SGD does."""
        gradient = self._slot.flat.grad
        assert gradient is not None
        pairs = zip(self._slot.layers, self._slot.layers_of(gradient), strict=True)
        weights, gradients = zip(*((w, g) for w, g in pairs if w.dim() > 1), strict=True)
        lengths, slopes = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(gradients))
        ratios = self._trust * lengths / (slopes + WEIGHT_DECAY * lengths + 1e-9)
        torch._foreach_add_(gradients, weights, alpha=WEIGHT_DECAY)
        torch._foreach_mul_(gradients, list(ratios.unbind()))
        return super().step(closure)


@dataclass(frozen=True)
class Method:
    """A row of the study.

    Attributes:
        name: as it is reported.
        family: `baseline`, `ours`, `msam` or `noise`: the best of a family goes into the second stage.
        base: `heavy-ball`, `nesterov` or `lars`.
        scheme: fields of `ExtrapConfig`; empty for the base optimizer alone.
        after_warm_up: whether extrapolation begins when the warm-up of the learning rate has ended.
    """

    name: str
    family: str
    base: str
    scheme: dict[str, Any]
    after_warm_up: bool = False

    def optimizer(self, slot: Slot, learning_rate: float) -> Optimizer:
        """The base optimizer over the slot's parameter."""
        if self.base == "lars":
            return Lars(slot, learning_rate)
        nesterov = self.base == "nesterov"
        return SGD([slot.flat], learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=nesterov)

    def config(self, warm_up_steps: int, seed: int) -> ExtrapConfig:
        """The scheme. Parameters stay at their addresses, and the host does not wait for the device."""
        start = warm_up_steps if self.after_warm_up else 0
        return ExtrapConfig(**self.scheme, start_step=start, seed=seed, swap=False, check_finite=False)


def _msam(rho: float, ascent: bool = False) -> dict[str, Any]:
    """Momentum-SAM (arXiv 2401.12033): y = x + ρ Δx/‖Δx‖ along the last update, of a fixed length.

    The sign is that of the authors' code (MarlonBecker/MSAM): forward, as Nesterov's look ahead.
    """
    fixed = {"scaling": "norm", "step_size": rho, "anneal": False, "ascent": ascent}
    return {"direction": "past_update", "scope": "global", **fixed}


def _past(**length: Any) -> dict[str, Any]:
    return {"direction": "past_gradient", "scope": "local", **length}


METHODS: Sequence[Method] = (
    Method("heavy ball", "baseline", "heavy-ball", {}),
    Method("Nesterov", "baseline", "nesterov", {}),
    Method("LARS", "baseline", "lars", {}),
    Method("extrap-past, ratio 1/32", "ours", "nesterov", _past(step_ratio=1 / 32)),
    Method("extrap-past, ratio 0.127", "ours", "nesterov", _past(step_ratio=0.127)),
    Method("extrap-past, ratio 0.5", "ours", "nesterov", _past(step_ratio=0.5)),
    Method("extrap-past, share 0.5", "ours", "nesterov", _past(scaling="step", step_size=0.5)),
    Method(
        *("optimistic, ratio 0.127", "ours", "nesterov"),
        {"direction": "past_gradient", "scope": "global", "step_ratio": 0.127},
    ),
    Method(
        *("Gaussian, share 0.5", "noise", "nesterov"),
        {"direction": "gaussian", "scope": "local", "scaling": "step", "step_size": 0.5},
    ),
    Method(
        *("past-update, ratio 0.5", "ours", "nesterov"),
        {"direction": "past_update", "scope": "global", "step_ratio": 0.5},
    ),
    Method("msam, rho 1", "msam", "heavy-ball", _msam(1.0), after_warm_up=True),
    Method("msam, rho 3", "msam", "heavy-ball", _msam(3.0), after_warm_up=True),
)
"""The methods of the first stage."""

EXTRAS: Sequence[Method] = (
    Method("msam, rho 0.3", "msam", "heavy-ball", _msam(0.3), after_warm_up=True),
    Method("msam, rho 1, ascent", "noise", "heavy-ball", _msam(1.0, ascent=True), after_warm_up=True),
)
"""Methods of the first stage where time is left."""
