"""Memory: what was a direction takes the next gradient, a copy of x, or y; and who has its memory to itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Spares:
    """At most one spare tensor of each parameter and type; of K workers the next one needs no more."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(
        self, index: int, like: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor:
        """A tensor with any content, laid out as `like` is.

        Args:
            index: of the parameter.
            like: whose shape, strides, device and kind it gets.
            dtype: another one than that of `like`.
            device: the same.
        """
        spare = self.find(index, like, dtype, device)
        return torch.empty_like(like, dtype=dtype, device=device) if spare is None else spare

    def find(
        self, index: int, like: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor | None:
        """The same, None where there is none spare."""
        spare = self._free.pop((index, dtype or like.dtype), None)
        return spare if spare is not None and fits(spare, like, device) else None

    def give(self, index: int, tensor: Tensor | None) -> None:
        """Take back a tensor that nobody reads any more."""
        if tensor is not None:
            self._free[index, tensor.dtype] = tensor

    def take_all(self, other: Spares) -> None:
        """Take what is spare there."""
        self._free |= other._free
        other.clear()

    def tensors(self) -> list[Tensor]:
        """What is free now."""
        return list(self._free.values())

    def __reduce__(self) -> tuple[type[Spares], tuple[()]]:
        """Saved as nothing: any content is as good."""
        return Spares, ()

    def clear(self) -> None:
        """Free the memory."""
        self._free.clear()


def fits(tensor: Tensor, like: Tensor, device: torch.device | None = None) -> bool:
    """Whether a tensor is laid out as another one is, types aside, and on the same device or on the one given."""
    if tensor.shape != like.shape or tensor.stride() != like.stride() or tensor.device != (device or like.device):
        return False
    if isinstance(tensor, DTensor) and isinstance(like, DTensor):
        return tensor.placements == like.placements and tensor.device_mesh == like.device_mesh
    return isinstance(tensor, DTensor) == isinstance(like, DTensor)


class Owners:
    """Which parameters have their memory to themselves, looked at again when one has moved."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._owners: list[bool] = []

    def among(self, params: Sequence[Tensor]) -> list[bool]:
        """Of each parameter, at rest."""
        addresses = [0 if isinstance(p, DTensor) else p.data_ptr() for p in params]
        if addresses != self._addresses:
            count = Counter(addresses)
            self._owners = [owns_memory(p) and count[a] == 1 for p, a in zip(params, addresses, strict=True)]
            self._addresses = addresses
        return self._owners


def owns_memory(param: Tensor) -> bool:
    """Whether a parameter, and no view or other process, has its memory to itself, as far as can be seen."""
    if isinstance(param, DTensor) or param.layout is not torch.strided:
        return False
    storage = param.untyped_storage()
    return storage.nbytes() == param.numel() * param.element_size() and not (
        param.device.type == "cpu" and param.is_shared()
    )
