"""The bytes that a running step communicates, and those that an optimizer holds."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {"allreduce": "all_reduce", "reduce_scatter": "reduce_scatter", "allgather": "all_gather"}


class CollectiveCounter(TorchDispatchMode):
    """Counts every collective of torch.distributed inside the context, including those issued in C++, as by DDP.

    Attributes:
        sizes: bytes of the whole tensors by kind: `all_reduce`, `reduce_scatter`, `all_gather`; other collectives have
            their own names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1].strip("_")
            kind = next((kind for prefix, kind in KINDS.items() if name.startswith(prefix)), name)
            # The larger of input and output is the whole tensor.
            self.sizes[kind] += max(
                sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(arg) if isinstance(leaf, Tensor))
                for arg in args
            )
        return func(*args, **(kwargs or {}))


def live_bytes() -> int:
    """Bytes of all tensors that Python code refers to, each storage counted once."""
    gc.collect()
    return _bytes(value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter))


def held_bytes(optimizer: Optimizer, before: int) -> int:
    """Bytes of live tensors other than parameters, gradients and the optimizer's state: x and the directions.

    Args:
        optimizer: its parameters hold the extrapolated point y.
        before: `live_bytes` from before the model was made.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    own = [*params, *(p.grad for p in params if p.grad is not None), *tree_leaves(list(optimizer.state.values()))]
    return live_bytes() - before - _bytes(value for value in own if isinstance(value, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
