"""S(d, x), and the moves of parameters over lists of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .config import STEP_SCALINGS
from .directions import generator_for
from .shards import held, whole

_TINY = torch.finfo(torch.float32).tiny

_LARGE = 1 << 15
"""Elements from which the norm of a tensor on a CPU is computed by itself."""


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors taken as one vector, as a tensor of no dimension, in at least float32."""
    return torch.linalg.vector_norm(norms(tensors)) if tensors else torch.zeros(())


def norms(tensors: Sequence[Tensor], like: Sequence[Tensor] = ()) -> Tensor:
    """The Euclidean norm of each tensor, as a tensor with one element for each, in at least float32, and float64 where
    any of them, or of `like`, is."""
    wide = torch.float64 if torch.float64 in {t.dtype for t in (*tensors, *like)} else torch.float32
    large = {i for i, t in enumerate(tensors) if t.numel() >= _LARGE and t.dtype == wide and _is_plain_vector(t)}
    rest = [t for i, t in enumerate(tensors) if i not in large]
    found = iter(torch._foreach_norm(rest, dtype=wide) if rest else ())
    each = [_by_dot(t) if i in large else next(found) for i, t in enumerate(tensors)]
    if len({n.device for n in each}) > 1:
        each = [n.to(each[0].device) for n in each]
    return whole(torch.stack(each))


def _is_plain_vector(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not isinstance(tensor, DTensor) and tensor.is_contiguous()


def _by_dot(tensor: Tensor) -> Tensor:
    """The norm at the speed of memory, which PyTorch's own kernel for a CPU has two thirds of, and more exactly."""
    vector = tensor.detach().view(-1)
    return torch.dot(vector, vector).sqrt_()


def scale_direction(
    scaling: str, direction: Sequence[Tensor], x: Sequence[Tensor], last_step: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
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
        Tensors, and the factor of each, one dimension, that makes them S(d, x); None for 1. The tensors are those of
        `direction` itself wherever a number for each will do. A zero direction stays zero.
    """
    if scaling == "none":
        return list(direction), None
    if scaling in ("filter", "adaptive"):
        wide = [d.to(torch.promote_types(p.dtype, torch.float32)) for d, p in zip(direction, x, strict=True)]
        if scaling == "filter":
            return [_by_filter(d, p) for d, p in zip(wide, x, strict=True)], None
        norm = total_norm([p * d for d, p in zip(wide, x, strict=True)]).clamp_min(_TINY)
        return [p.square().mul(d).div_(norm) for d, p in zip(wide, x, strict=True)], None
    lengths = norms(direction, like=x)
    if scaling in ("norm", "step"):
        lengths = torch.linalg.vector_norm(lengths).expand(len(direction))
    if scaling == "norm":
        return list(direction), lengths.clamp_min(_TINY).reciprocal()
    if scaling == "layer":
        return list(direction), norms(x).to(lengths) / lengths.clamp_min(_TINY)
    assert scaling in STEP_SCALINGS and last_step is not None
    wanted = torch.linalg.vector_norm(last_step) if scaling == "step" else last_step
    return list(direction), wanted.to(lengths) / lengths.clamp_min(_TINY)


def _by_tensor(direction: Tensor, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(direction).clamp_min(_TINY)
    return direction * (torch.linalg.vector_norm(x.to(direction.dtype)) / norm)


def _by_filter(direction: Tensor, x: Tensor) -> Tensor:
    if direction.dim() < 2:
        return _by_tensor(direction, x)
    rest = tuple(range(1, direction.dim()))
    norm = torch.linalg.vector_norm(direction, dim=rest, keepdim=True).clamp_min(_TINY)
    return direction * (torch.linalg.vector_norm(x.to(direction.dtype), dim=rest, keepdim=True) / norm)


def displace(
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    steps: Sequence[float | Tensor],
    out: Sequence[Tensor],
    seed: Callable[[int], tuple[object, ...]],
) -> None:
    """x − step · d, in one pass over memory: x and d are read, y is written.

    A bfloat16 parameter has eight bits: most displacements are below half of its last one, and rounding to nearest
    would undo them. Such parameters are rounded up or down at random, so that the expectation of y is right.

    Args:
        params: x.
        direction: of the same shapes.
        steps: η times the factor of `scale_direction`, for each: numbers, or tensors of no dimension where reading them
            would make the host wait.
        out: where y goes: x or d themselves, or other memory of the type of x.
        seed: of the rounding of a parameter, by its place here.
    """
    for i, (p, d, step, y) in enumerate(zip(params, direction, steps, out, strict=True)):
        if isinstance(p, DTensor):
            p, d, y = held(p), held(d), held(y)
        if p.dtype == torch.bfloat16:
            wide = p.float().sub_(d.float() * step)
            y.copy_(stochastic_round(wide, generator_for(wide.device, *seed(i))))
        elif isinstance(step, Tensor):
            torch.addcmul(p, d.to(p.dtype), step.to(p), value=-1, out=y)
        else:
            torch.add(p, d if d.dtype == p.dtype else d.to(p.dtype), alpha=-step, out=y)


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
