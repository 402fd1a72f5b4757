"""The bytes that a running step really communicates and holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_extrap.optim.extrapolated import Extrapolated

KINDS = {"allreduce": "all_reduce", "reduce_scatter": "reduce_scatter", "allgather": "all_gather"}


class CollectiveCounter(TorchDispatchMode):
    """Counts every collective of torch.distributed inside the context, those of C++ such as DDP's among them.

    Attributes:
        sizes: bytes by kind: the whole tensor, that all parts make up together; `all_reduce`, `reduce_scatter`,
            `all_gather`, and under its own name what else is communicated.
        calls: how many of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1].strip("_")
            kind = next((kind for prefix, kind in KINDS.items() if name.startswith(prefix)), name)
            # Of input and output, the larger is the whole.
            self.sizes[kind] += max(_bytes(tree_leaves(arg)) for arg in args)
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def held_bytes(optimizer: Extrapolated) -> dict[str, int]:
    """Bytes of this process: `x`, kept beside y; `directions`, with the gradients that may become the next ones and
    what is spare; and on the `host`, where direction_device says so, with one worker's beside the parameters."""
    return {name: _bytes(tensors) for name, tensors in optimizer.scheme.held().items()}


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
