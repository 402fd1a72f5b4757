"""Norms, copies and checks over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .sharding import held, whole

_LARGE = 1 << 15
"""Elements from which the norm of a CPU tensor is computed by a dot product."""


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors as one vector, 0-dim, in at least float32."""
    return torch.linalg.vector_norm(norms(tensors)) if tensors else torch.zeros(())


def norms(tensors: Sequence[Tensor], like: Sequence[Tensor] = ()) -> Tensor:
    """The Euclidean norm of each tensor.

    Args:
        tensors: at least one, of any shapes.
        like: tensors whose dtypes count for the result's too.

    Returns:
        (len(tensors),), float64 where any dtype is float64, else float32.
    """
    tensors = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    tensors = [torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t for t in tensors]
    wide = torch.float64 if torch.float64 in {t.dtype for t in (*tensors, *like)} else torch.float32
    large = {i for i, t in enumerate(tensors) if t.numel() >= _LARGE and t.dtype == wide and _is_plain_vector(t)}
    rest = [t for i, t in enumerate(tensors) if i not in large]
    found = iter(torch._foreach_norm(rest, dtype=wide) if rest else ())
    each = [_norm_by_dot(t) if i in large else next(found) for i, t in enumerate(tensors)]
    if len({n.device for n in each}) > 1:
        each = [n.to(each[0].device) for n in each]
    return whole(torch.stack(each))


def _is_plain_vector(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not isinstance(tensor, DTensor) and tensor.is_contiguous()


def _norm_by_dot(tensor: Tensor) -> Tensor:
    """The norm at the bandwidth of memory; PyTorch's CPU kernel for norms reaches two thirds of it."""
    vector = tensor.detach().view(-1)
    return torch.dot(vector, vector).sqrt_()


def is_finite(tensors: Sequence[Tensor | None]) -> bool:
    """Whether every element of every tensor is finite; the host waits for the device."""
    present = [t for t in tensors if t is not None]
    if bool(torch.isfinite(total_norm(present))):
        return True
    # The squares of large finite elements overflow.
    return all(bool(torch.isfinite(whole(torch.linalg.vector_norm(t, ord=torch.inf)))) for t in present if t.numel())


@torch.no_grad()
def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy bit for bit, list to list."""
    if targets:
        torch._foreach_copy_([held(t) for t in targets], [held(s) for s in sources])
