"""The diagonal preconditioner of Adam and similar optimizers, from the state of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from .buffers import Buffers
from .engines.base import Engine


class Preconditioner:
    """P of the step in progress; the identity where the configuration does not ask for one.

    Args:
        engine: holds the parameters.
        base: the optimizer whose state gives P.
        enabled: `ExtrapConfig.precondition`.
    """

    def __init__(self, engine: Engine, base: Optimizer, enabled: bool) -> None:
        self._engine = engine
        self._base = base
        self._enabled = enabled
        self._scales: list[Tensor | None] | None = None

    def apply(self, direction: Buffers) -> Buffers:
        """P d; None for a parameter that the base optimizer has not stepped yet.

        Raises:
            ValueError: if the state of the base optimizer is not Adam's.
        """
        if not self._enabled:
            return direction
        params = self._engine.params()
        if self._scales is None or len(self._scales) != len(params):
            self._scales = adam_preconditioner(self._base, params)
        moved: Buffers = []
        for p, d, scale in zip(params, direction, self._scales, strict=False):
            if d is not None and scale is None and self._base.state.get(p):
                raise ValueError(
                    f"precondition is true, but the base optimizer {type(self._base).__name__} keeps no exp_avg_sq and "
                    "step for each element; allowed: Adam and its kin, or precondition false."
                )
            moved.append(None if d is None or scale is None else scale * d)
        return moved

    def in_metric(self, tensors: Mapping[int, Tensor], power: float) -> Mapping[int, Tensor]:
        """Each tensor, by the index of its parameter, times Pᵖᵒʷᵉʳ."""
        if (scales := self._scales) is None:
            return tensors
        return {i: t if (scale := scales[i]) is None else t * scale.pow(power).to(t) for i, t in tensors.items()}

    def forget(self) -> None:
        """Start a step."""
        self._scales = None


def adam_preconditioner(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Tensor | None]:
    """P = 1 / (√v̂ + ε) of the next step, with v̂ = v / (1 − β₂ᵗ), or its maximum so far (AMSGrad).

    Adam steps along P times a mean gradient, and is stable by the curvature in that metric, λ_max(P^½ H P^½) (Cohen et
    al. 2022, "Adaptive gradient methods at the edge of stability"; their P has the factor 1 − β₁ᵗ too, soon 1).

    Args:
        optimizer: any; its state counts as Adam's where it has `exp_avg_sq`, of the parameter's shape, and `step`.
        params: in the order of the result.

    Returns:
        One tensor per parameter, in at least float32; None where the state is not Adam's, or empty.
    """
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    found: list[Tensor | None] = []
    for p in params:
        state, group = optimizer.state.get(p, {}), group_of.get(p, {})
        second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if second is None or second.shape != p.shape or "step" not in state or not {"betas", "eps"} <= set(group):
            found.append(None)
            continue
        correction = 1 - float(group["betas"][1]) ** float(state["step"])
        wide = second.to(torch.promote_types(second.dtype, torch.float32))
        found.append((wide / correction).sqrt_().add_(float(group["eps"])).reciprocal_())
    return found
