"""S(d, x), and the moves of parameters over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import STEP_SCALINGS
from .directions import generator_for
from .shards import held, whole

_TINY = torch.finfo(torch.float32).tiny


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors taken as one vector, as a tensor of no dimension, in at least float32."""
    return torch.linalg.vector_norm(norms(tensors)) if tensors else torch.zeros(())


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, as a tensor with one element for each, in at least float32."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    each = torch._foreach_norm(wide)
    stacked = torch.stack([n.to(each[0].device) for n in each])
    return whole(stacked)


def scale_direction(
    scaling: str, direction: Sequence[Tensor], x: Sequence[Tensor], last_step: Tensor | None = None
) -> list[Tensor]:
    """S(d, x) of the algorithm: the direction in the units that the step size is given in.

    Args:
        scaling: `none`, d itself; `norm`, d / ‖d‖ over all tensors (SAM, Foret et al. 2021); `layer`, ‖x‖ · d / ‖d‖ a
            tensor; `filter`, the same for each slice along the first dimension of a tensor with two or more (Li et al.
            2018); `adaptive`, x² · d / ‖x · d‖ (ASAM, Kwon et al. 2021);
            `step`, ‖Δx‖ · d / ‖d‖ over all tensors with Δx the last step of x, which makes η a share of it;
            `layer_step`, the same a tensor.
        direction: d, one tensor a parameter.
        x: the parameters, of the same shapes.
        last_step: ‖Δx‖ of each tensor, one dimension; for `step` also of tensors that have no direction.

    Returns:
        New tensors, or those of `direction` itself for `none`. A zero direction stays zero.
    """
    if scaling == "none":
        return list(direction)
    direction = [d.to(torch.promote_types(p.dtype, torch.float32)) for d, p in zip(direction, x, strict=True)]
    if scaling == "norm":
        norm = total_norm(direction).clamp_min(_TINY)
        return [d / norm for d in direction]
    if scaling == "adaptive":
        norm = total_norm([p * d for d, p in zip(direction, x, strict=True)]).clamp_min(_TINY)
        return [p.square() * d / norm for d, p in zip(direction, x, strict=True)]
    if scaling in STEP_SCALINGS:
        assert last_step is not None
        lengths = norms(direction)
        if scaling == "step":
            last_step, lengths = torch.linalg.vector_norm(last_step), torch.linalg.vector_norm(lengths)
        factors = (last_step.to(lengths) / lengths.clamp_min(_TINY)).expand(len(direction))
        return [d * factor.to(d) for d, factor in zip(direction, factors.unbind(), strict=True)]
    relative = {"layer": _by_tensor, "filter": _by_filter}[scaling]
    return [relative(d, p) for d, p in zip(direction, x, strict=True)]


def _by_tensor(direction: Tensor, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(direction).clamp_min(_TINY)
    return direction * (torch.linalg.vector_norm(x.to(direction.dtype)) / norm)


def _by_filter(direction: Tensor, x: Tensor) -> Tensor:
    if direction.dim() < 2:
        return _by_tensor(direction, x)
    rest = tuple(range(1, direction.dim()))
    norm = torch.linalg.vector_norm(direction, dim=rest, keepdim=True).clamp_min(_TINY)
    return direction * (torch.linalg.vector_norm(x.to(direction.dtype), dim=rest, keepdim=True) / norm)


def displace_(
    params: Sequence[Tensor], direction: Sequence[Tensor], step: float | Tensor, seeds: Sequence[tuple[object, ...]]
) -> None:
    """x − step · d in place, in one pass over memory.

    A bfloat16 parameter has eight bits: most displacements are below half of its last one, and rounding to nearest
    would undo them. Such parameters are rounded up or down at random, so that the expectation of y is right.

    Args:
        params: x, overwritten by y.
        direction: S(d, x), of the same shapes.
        step: η, a number, or a tensor of no dimension where reading it would make the host wait.
        seeds: of the rounding of each parameter.
    """
    params, direction = [held(p) for p in params], [held(d) for d in direction]
    coarse = [i for i, p in enumerate(params) if p.dtype == torch.bfloat16]
    for i in coarse:
        wide = params[i].float().sub_(direction[i].float() * step)
        generator = generator_for(wide.device, *seeds[i])
        params[i].copy_(stochastic_round(wide, generator))
    if len(coarse) == len(params):
        return
    exact = [p for p in params if p.dtype != torch.bfloat16]
    moves = [d.to(p.dtype) for d, p in zip(direction, params, strict=True) if p.dtype != torch.bfloat16]
    if isinstance(step, Tensor):
        for p, d in zip(exact, moves, strict=True):
            p.addcmul_(d, step.to(p), value=-1)
    else:
        torch._foreach_add_(exact, moves, alpha=-step)


def stochastic_round(wide: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down with the probabilities that make the expectation exact.

    bfloat16 is the upper half of float32: random lower halves are added, and what does not carry is cut off.
    Infinities and NaNs pass unchanged.
    """
    bits = wide.view(torch.int32)
    carry = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    rounded = bits.add(carry).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(wide), rounded, wide).to(torch.bfloat16)


@torch.no_grad()
def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy bit for bit, list to list."""
    if targets:
        torch._foreach_copy_([held(t) for t in targets], [held(s) for s in sources])
