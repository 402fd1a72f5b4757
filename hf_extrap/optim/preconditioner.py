"""The diagonal preconditioner of Adam and its kin, from the state of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


def adam_preconditioner(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Tensor | None]:
    """P = 1 / (√v̂ + ε) of the next step, with v̂ = v / (1 − β₂ᵗ), or its maximum so far (AMSGrad).

    Adam steps along P times a mean gradient, and its steps are stable by the curvature in that metric, λ_max(P^½ H P^½)
    (Cohen et al. 2022, "Adaptive gradient methods at the edge of stability"; their P carries 1 − β₁ᵗ too, soon 1).

    Args:
        optimizer: any; its state counts as Adam's where it holds `exp_avg_sq`, of the parameter's shape, and `step`.
        params: in the order of the result.

    Returns:
        One tensor a parameter, in at least float32; None for a parameter without such a state: of another kind of
        optimizer, or not stepped yet.
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
