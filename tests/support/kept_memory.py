"""What an object keeps in memory: found by following references, so that nothing of its inside must be known."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from hf_extrap import Extrapolated


def kept_beside(model: nn.Module, optimizer: Extrapolated, device: str | None = None) -> int:
    """Tensors of the parameters' shapes that the wrapper adds to parameters, gradients and the base optimizer's state.

    Memory is counted once, whoever points to it; while the parameters point to y, x and y are two.

    Args:
        device: count memory of this kind alone; then parameters are on another one.
    """
    params = list(model.parameters())
    shapes = {p.shape for p in params}
    state = [t for values in optimizer.base.state.values() for t in values.values() if isinstance(t, Tensor)]
    known = {t.data_ptr() for t in (*state, *(p.grad for p in params if p.grad is not None))}
    found = {t.data_ptr() for t in (*tensors_of(optimizer), *params) if t.shape in shapes and is_on(t, device)} - known
    return len(found) - sum(is_on(p, device) for p in params)


def is_on(tensor: Tensor, device: str | None) -> bool:
    return device is None or tensor.device.type == device


def tensors_of(root: object) -> Iterable[Tensor]:
    """Every tensor that can be reached from an object, through closures too, but not through other tensors."""
    seen, found, left = {id(root)}, list[Tensor](), [root]
    while left:
        for next_ in _referents(left.pop()):
            if id(next_) not in seen and not isinstance(next_, (type, ModuleType)):
                seen.add(id(next_))
                if isinstance(next_, Tensor):
                    found.append(next_.detach())
                else:
                    left.append(next_)
    return found


def _referents(parent: Any) -> list[Any]:
    if isinstance(parent, FunctionType):
        return [parent.__closure__, parent.__defaults__, parent.__kwdefaults__]
    return gc.get_referents(parent)
