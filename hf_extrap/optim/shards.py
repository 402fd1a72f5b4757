"""Sharded tensors: the part that this process holds, and the whole."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor; another one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(param: Tensor, part: Tensor) -> Tensor:
    """The inverse of `held`: a part as that of a tensor that is sharded as `param` is."""
    if not isinstance(param, DTensor):
        return part
    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all of its shards; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(param: Tensor) -> bool:
    """Whether FSDP, of either version, or ZeRO-3 has cut a parameter up among the processes."""
    return isinstance(param, DTensor) or type(param).__name__ == "FlatParameter" or hasattr(param, "ds_id")
