"""S(d, x): the scalings of a direction, which fix the units of the step size.

A scaling takes the direction d, the parameters x (one tensor each, of the same shapes) and ‖Δx‖ of each parameter's
last step. It returns tensors and one factor per tensor, or None for factors of 1; their products are S(d, x). Tensors
are those of d itself wherever one factor per tensor is enough. Where the length of a direction is 0, so is S(d, x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .foreach import norms, total_norm

Scaled = tuple[list[Tensor], Tensor | None]
Scaling = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None], Scaled]


def unscaled(d: Sequence[Tensor], x: Sequence[Tensor], last_step: Tensor | None) -> Scaled:
    """d."""
    return list(d), None


def by_norm(d: Sequence[Tensor], x: Sequence[Tensor], last_step: Tensor | None) -> Scaled:
    """d / ‖d‖ over all tensors (SAM, Foret et al. 2021)."""
    return list(d), _finite(torch.linalg.vector_norm(norms(d, like=x)).reciprocal()).expand(len(d))


def by_layer(d: Sequence[Tensor], x: Sequence[Tensor], last_step: Tensor | None) -> Scaled:
    """‖x‖ · d / ‖d‖ of each tensor."""
    lengths = norms(d, like=x)
    return list(d), _finite(norms(x).to(lengths) / lengths)


def by_filter(d: Sequence[Tensor], x: Sequence[Tensor], last_step: Tensor | None) -> Scaled:
    """‖x‖ · d / ‖d‖ of each slice along the first dimension, or of a whole vector (Li et al. 2018)."""
    return [_filtered(v, p) for v, p in zip(_wide(d, x), x, strict=True)], None


def adaptive(d: Sequence[Tensor], x: Sequence[Tensor], last_step: Tensor | None) -> Scaled:
    """x² · d / ‖x · d‖ over all tensors (ASAM, Kwon et al. 2021)."""
    wide = _wide(d, x)
    norm = total_norm([p * v for v, p in zip(wide, x, strict=True)])
    norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return [p.square().mul(v).div_(norm) for v, p in zip(wide, x, strict=True)], None


def by_step(d: Sequence[Tensor], x: Sequence[Tensor], last_step: Tensor | None) -> Scaled:
    """‖Δx‖ · d / ‖d‖ over all tensors, where Δx is the last step: the step size is a share of it."""
    assert last_step is not None
    length = torch.linalg.vector_norm(norms(d, like=x))
    return list(d), _finite(torch.linalg.vector_norm(last_step).to(length) / length).expand(len(d))


def by_layer_step(d: Sequence[Tensor], x: Sequence[Tensor], last_step: Tensor | None) -> Scaled:
    """‖Δx‖ · d / ‖d‖ of each tensor, where Δx is its last step."""
    assert last_step is not None
    lengths = norms(d, like=x)
    return list(d), _finite(last_step.to(lengths) / lengths)


SCALINGS: dict[str, Scaling] = {
    "none": unscaled,
    "norm": by_norm,
    "layer": by_layer,
    "filter": by_filter,
    "adaptive": adaptive,
    "step": by_step,
    "layer_step": by_layer_step,
}
"""By the name in `ExtrapConfig.scaling`."""


def _finite(factors: Tensor) -> Tensor:
    """0 in place of a factor that overflows, where the length of the direction is 0 or almost 0."""
    return torch.nan_to_num(factors, nan=0.0, posinf=0.0, neginf=0.0)


def _wide(d: Sequence[Tensor], x: Sequence[Tensor]) -> list[Tensor]:
    return [v.to(torch.promote_types(p.dtype, torch.float32)) for v, p in zip(d, x, strict=True)]


def _filtered(d: Tensor, x: Tensor) -> Tensor:
    rest = tuple(range(1, d.dim())) if d.dim() >= 2 else None
    length = torch.linalg.vector_norm(d, dim=rest, keepdim=rest is not None)
    return d * _finite(torch.linalg.vector_norm(x.to(d.dtype), dim=rest, keepdim=rest is not None) / length)
