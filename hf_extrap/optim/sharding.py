"""Sharded tensors: the local part, and the whole tensor."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def held(tensor: Tensor) -> Tensor:
    """The local part of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(param: Tensor, part: Tensor) -> Tensor:
    """The inverse of `held`: the local part of a tensor that is sharded as `param` is."""
    if not isinstance(param, DTensor):
        return part
    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, a collective call; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(param: Tensor) -> bool:
    """Whether FSDP (either version) or ZeRO-3 has sharded a parameter."""
    return isinstance(param, DTensor) or type(param).__name__ == "FlatParameter" or hasattr(param, "ds_id")
