"""Memory that has served: what was a direction takes the next gradient, a copy of x, or y."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Spares:
    """At most one spare tensor of each parameter and type; of K workers the next one needs no more."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, index: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor with any content, laid out as `like` is.

        Args:
            index: of the parameter.
            like: whose shape, strides, device and kind it gets.
            dtype: another one than that of `like`.
        """
        dtype = dtype or like.dtype
        spare = self._free.pop((index, dtype), None)
        return spare if spare is not None and fits(spare, like) else torch.empty_like(like, dtype=dtype)

    def give(self, index: int, tensor: Tensor | None) -> None:
        """Take back a tensor that nobody reads any more."""
        if tensor is not None:
            self._free[index, tensor.dtype] = tensor

    def tensors(self) -> list[Tensor]:
        """What is free now."""
        return list(self._free.values())

    def __reduce__(self) -> tuple[type[Spares], tuple[()]]:
        """Saved as nothing: any content is as good."""
        return Spares, ()

    def clear(self) -> None:
        """Free the memory."""
        self._free.clear()


def fits(tensor: Tensor, like: Tensor) -> bool:
    """Whether a tensor is laid out as another one is, types aside."""
    if tensor.shape != like.shape or tensor.device != like.device or tensor.stride() != like.stride():
        return False
    if isinstance(tensor, DTensor) and isinstance(like, DTensor):
        return tensor.placements == like.placements and tensor.device_mesh == like.device_mesh
    return isinstance(tensor, DTensor) == isinstance(like, DTensor)
