"""The diagonal preconditioner of Adam and its kin, from the state of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from .curvature import flatten


def adam_preconditioner(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Tensor | None:
    """P = 1 / (√v̂ + ε) of the next step's metric, (n,), with v̂ = v / (1 − β₂ᵗ), or its maximum so far (AMSGrad).

    Adam's steps are stable along curvature measured in this metric: by λ_max(P^½ H P^½) (Cohen et al. 2022, "Adaptive
    gradient methods at the edge of stability", whose P also carries Adam's 1 − β₁ᵗ, soon 1). P is 0 for parameters
    that have not been stepped.

    Args:
        optimizer: any; its state counts as Adam's where it holds `exp_avg_sq`, of the parameter's shape, and `step`.
        parameters: in the order of the vector.

    Returns:
        None if no parameter has such a state: another kind of optimizer, or one that has not stepped yet.
    """
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = False
    parts = []
    for p in parameters:
        state, group = optimizer.state.get(p, {}), group_of.get(p, {})
        second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if second is None or second.shape != p.shape or "step" not in state or not {"betas", "eps"} <= set(group):
            parts.append(torch.zeros_like(p))
            continue
        found = True
        correction = 1 - float(group["betas"][1]) ** float(state["step"])
        parts.append(1 / ((second / correction).sqrt() + float(group["eps"])).to(p))
    return flatten(parts) if found else None


def preconditioned(product: Callable[[Tensor], Tensor], preconditioner: Tensor) -> Callable[[Tensor], Tensor]:
    """v → P^½ H P^½ v, which has the eigenvalues of P H and is symmetric, from v → H v and the diagonal P."""
    root = preconditioner.sqrt()
    return lambda vector: root * product(root * vector)
