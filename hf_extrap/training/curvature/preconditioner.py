"""Curvature in the metric of Adam's preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_extrap.optim import preconditioner

from .mean_loss import flatten


def adam_preconditioner(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Tensor | None:
    """P of `hf_extrap.optim.preconditioner.adam_preconditioner` as one vector, (n,), 0 for what was not stepped.

    Returns:
        None if no parameter has one: another kind of optimizer, or one that has not stepped yet.
    """
    parts = preconditioner.adam_preconditioner(optimizer, parameters)
    if all(part is None for part in parts):
        return None
    return flatten([torch.zeros_like(p) if s is None else s.to(p) for s, p in zip(parts, parameters, strict=True)])


def preconditioned(product: Callable[[Tensor], Tensor], preconditioner: Tensor) -> Callable[[Tensor], Tensor]:
    """v → P^½ H P^½ v, which has the eigenvalues of P H and is symmetric, from v → H v and the diagonal P."""
    root = preconditioner.sqrt()
    return lambda vector: root * product(root * vector)
