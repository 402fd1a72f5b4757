"""Copies that come as late as they may, and nobody who touches their memory before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_extrap.optim.sharding import held
from hf_extrap.optim.transfers import Transfers


class LateTransfers(Transfers):
    """Copies when joined or finished, as a device's stream might; `running` are those that have been asked for."""

    running: list[tuple[Tensor, Tensor]] = []  # of all instances, for the watch

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.running.extend(pairs)

    def join(self) -> None:
        pairs = list(self.running)
        self.running.clear()
        for to, source in pairs:
            to.copy_(source)

    finish = join


class Watch(TorchDispatchMode):
    """An error for an operation that reads or writes what a running copy writes, or writes what one reads."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [_memory(to) for to, _ in LateTransfers.running]
        read = [_memory(source) for _, source in LateTransfers.running]
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            alias = argument.alias_info
            if alias is not None and not alias.is_write:
                continue  # a view, which touches nothing
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor) and tensor.numel():
                    memory = _memory(tensor)
                    assert not _meet(memory, written), f"{func} came before the copy into its memory had ended"
                    assert alias is None or not _meet(memory, read), f"{func} wrote what a copy still reads"
        return func(*args, **kwargs)


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor and the one after its last."""
    own = held(tensor)
    length = 1 + sum((size - 1) * stride for size, stride in zip(own.shape, own.stride(), strict=True))
    return own.data_ptr(), own.data_ptr() + length * own.element_size()


def _meet(memory: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    return any(memory[0] < end and start < memory[1] for start, end in others)
