"""The bytes that a running step communicates, and those that an optimizer holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_extrap.optim.extrapolated import Extrapolated

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


def held_bytes(optimizer: Extrapolated) -> dict[str, int]:
    """Bytes that extrapolation holds while the parameters hold y: `x`, `directions` and on the `host`."""
    return {
        name: sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        for name, tensors in optimizer.scheme.held().items()
    }
