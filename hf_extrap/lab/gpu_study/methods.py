"""The methods of the study: a base optimizer and a scheme of extrapolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from hf_extrap.optim.config import ExtrapConfig

from .slot import Slot

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4


class Lars(SGD):
    """SGD with momentum that scales each weight tensor's gradient to `trust` times the norm of the tensor.

    Biases and BatchNorm's parameters are neither scaled nor decayed.

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017.
    """

    def __init__(self, slot: Slot, lr: float, trust: float = 1e-3) -> None:
        super().__init__([slot.flat], lr=lr, momentum=MOMENTUM)
        self._slot, self._trust = slot, trust

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Scale the gradients in `.grad`, then step as SGD does."""
        flat = self._slot.flat
        assert flat.grad is not None
        pairs = zip(self._slot.layers_of(flat.detach()), self._slot.layers_of(flat.grad), strict=True)
        weights, gradients = zip(*((w, g) for w, g in pairs if w.dim() > 1), strict=True)
        norms, slopes = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(gradients))
        ratios = self._trust * norms / (slopes + WEIGHT_DECAY * norms + 1e-9)
        torch._foreach_add_(gradients, weights, alpha=WEIGHT_DECAY)
        torch._foreach_mul_(gradients, list(ratios.unbind()))
        return super().step(closure)


@dataclass(frozen=True)
class Method:
    """A row of the study.

    Attributes:
        name: in tables.
        family: the best method of each of `FAMILIES` enters the second stage.
        base: `heavy-ball`, `nesterov` or `lars`.
        scheme: fields of `ExtrapConfig`; empty for the base optimizer alone.
        after_warm_up: whether extrapolation begins after the warm-up of the learning rate.
    """

    name: str
    family: str
    base: str
    scheme: dict[str, Any] = field(default_factory=dict)
    after_warm_up: bool = False

    @property
    def rate_scale(self) -> float:
        """Its learning rates in units of those of SGD."""
        return 8.0 if self.base == "lars" else 1.0

    def optimizer(self, slot: Slot, learning_rate: float) -> Optimizer:
        """The base optimizer of the slot's parameter."""
        if self.base == "lars":
            return Lars(slot, learning_rate)
        nesterov = self.base == "nesterov"
        return SGD([slot.flat], learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=nesterov)

    def config(self, warm_up_steps: int, seed: int) -> ExtrapConfig:
        """The scheme; addresses of parameters stay fixed for the graph, and the host does not wait for the device."""
        start = warm_up_steps if self.after_warm_up else 0
        return ExtrapConfig(**self.scheme, start_step=start, seed=seed, swap=False, check_finite=False)


def _local(name: str, **length: Any) -> Method:
    return Method(name, "ours", "nesterov", {"direction": "past_gradient", "scope": "local", **length})


def _msam(name: str, rho: float, family: str = "msam", ascent: bool = False) -> Method:
    """Momentum-SAM (arXiv 2401.12033): y = x + ρ Δx/‖Δx‖ along the last update Δx, as in the authors' code."""
    scheme = {"direction": "past_update", "scope": "global", "scaling": "norm", "step_size": rho, "anneal": False}
    return Method(name, family, "heavy-ball", {**scheme, "ascent": ascent}, after_warm_up=True)


FAMILIES = ("baseline", "lars", "ours", "msam")
METHODS: Sequence[Method] = (
    Method("heavy ball", "baseline", "heavy-ball"),
    Method("Nesterov", "baseline", "nesterov"),
    Method("LARS", "lars", "lars"),
    _local("extrap-past, ratio 1/32", step_ratio=1 / 32),
    _local("extrap-past, ratio 0.127", step_ratio=0.127),
    _local("extrap-past, ratio 0.5", step_ratio=0.5),
    _local("extrap-past, share 0.5", scaling="step", step_size=0.5),
    Method(
        *("optimistic, ratio 0.127", "ours", "nesterov"),
        {"direction": "past_gradient", "scope": "global", "step_ratio": 0.127},
    ),
    Method(
        *("Gaussian, share 0.5", "control", "nesterov"),
        {"direction": "gaussian", "scope": "local", "scaling": "step", "step_size": 0.5},
    ),
    Method(
        *("past-update, ratio 0.5", "ours", "nesterov"),
        {"direction": "past_update", "scope": "global", "step_ratio": 0.5},
    ),
    _msam("msam, rho 1", 1.0),
    _msam("msam, rho 3", 3.0),
    _msam("msam, rho 0.3", 0.3),
    _msam("msam, rho 1, ascent", 1.0, "control", ascent=True),
)
BY_NAME = {method.name: method for method in METHODS}
