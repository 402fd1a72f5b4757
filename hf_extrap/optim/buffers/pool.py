"""The buffer pool, and which parameters own their storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class BufferPool:
    """Keeps at most one free tensor per parameter and dtype."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(
        self, index: int, like: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor:
        """A tensor of any content with the shape, strides and kind of `like`.

        Args:
            index: of the parameter.
            like: the tensor to imitate.
            dtype: default: that of `like`.
            device: default: that of `like`.
        """
        free = self.find(index, like, dtype, device)
        return torch.empty_like(like, dtype=dtype, device=device) if free is None else free

    def find(
        self, index: int, like: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor | None:
        """As `take`, but None where no free tensor fits."""
        free = self._free.pop((index, dtype or like.dtype), None)
        return free if free is not None and fits(free, like, device) else None

    def give(self, index: int, tensor: Tensor | None) -> None:
        """Return a tensor that is no longer read."""
        if tensor is not None:
            self._free[index, tensor.dtype] = tensor

    def take_all(self, other: BufferPool) -> None:
        """Move every free tensor of another pool into this one."""
        self._free |= other._free
        other.clear()

    def tensors(self) -> list[Tensor]:
        """The free tensors."""
        return list(self._free.values())

    def clear(self) -> None:
        """Release the memory."""
        self._free.clear()


def fits(tensor: Tensor, like: Tensor, device: torch.device | None = None) -> bool:
    """Whether shape, strides, kind and device agree; dtypes may differ."""
    if tensor.shape != like.shape or tensor.stride() != like.stride() or tensor.device != (device or like.device):
        return False
    if isinstance(tensor, DTensor) and isinstance(like, DTensor):
        return tensor.placements == like.placements and tensor.device_mesh == like.device_mesh
    return isinstance(tensor, DTensor) == isinstance(like, DTensor)


class StorageOwners:
    """Which parameters own their storage, so that they may point to other memory for a while."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._owners: list[bool] = []

    def among(self, params: Sequence[Tensor]) -> list[bool]:
        """One flag per parameter."""
        addresses = [0 if isinstance(p, DTensor) else p.data_ptr() for p in params]
        if addresses != self._addresses:
            count = Counter(addresses)
            self._owners = [owns_storage(p) and count[a] == 1 for p, a in zip(params, addresses, strict=True)]
            self._addresses = addresses
        return [owner and not has_alias(p) for owner, p in zip(self._owners, params, strict=True)]


def has_alias(param: Tensor) -> bool:
    """Whether another tensor, such as `param.detach()`, or an array shares the storage now."""
    # One reference is the parameter's, and one that of the storage object of this call.
    return torch._C._storage_Use_Count(param.untyped_storage()._cdata) > 2


def owns_storage(param: Tensor) -> bool:
    """Whether no view of the parameter and no other process is known to share its storage."""
    if isinstance(param, DTensor) or param.layout is not torch.strided:
        return False
    storage = param.untyped_storage()
    return storage.nbytes() == param.numel() * param.element_size() and not (
        param.device.type == "cpu" and param.is_shared()
    )
