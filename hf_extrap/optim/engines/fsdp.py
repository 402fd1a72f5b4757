"""FSDP2: parameters sharded by `torch.distributed.fsdp.fully_shard`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..capture import GradientCapture
from .base import Engine


class FSDPEngine(Engine):
    """Each process moves its own shards, and gathers what it has moved with the next forward pass."""

    name = "FSDP2"
    may_swap = False
    is_sharded = True

    def __init__(self, model: nn.Module, base: Optimizer) -> None:
        super().__init__(base)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._capture = ShardCapture()

    def moved(self) -> None:
        """Drop gathered parameters: after a pass without backward the root keeps its own, which would not move."""
        for module in self._modules:
            module.reshard()

    def capture(self) -> GradientCapture:
        """See `Engine.capture`."""
        self._capture = ShardCapture()
        return self._capture

    @contextmanager
    def probing(self) -> Iterator[Callable[[Tensor], None]]:
        """See `Engine.probing`.

        Raises:
            RuntimeError: where FSDP2 keeps gradients to itself, and would mix those at x and at y.
        """
        if self._capture.owes:
            raise RuntimeError(
                "probing() follows a backward pass whose gradient FSDP2 has not reduced yet and would add to the "
                "direction; allowed: set_requires_gradient_sync(True) before every worker's last backward pass."
            )
        with super().probing() as backward:
            yield backward
            if all(p.grad is None for p in self.leaves()):
                raise RuntimeError(
                    "the passes inside probing() left no gradient, and FSDP2 would add theirs to the step's; allowed: "
                    "set_requires_gradient_sync(True) and set_requires_all_reduce(True) before the last of them."
                )


class ShardCapture(GradientCapture):
    """Sees the averaged gradient that the step has gathered so far, this process's shard of each parameter.

    FSDP2 runs no hook on the gradient of a sharded parameter but those of `register_post_accumulate_grad_hook`, once it
    has added to `.grad`. A single pass's own gradient is not to be seen, and neither is its squared norm.
    """

    sees_passes = False

    def __init__(self) -> None:
        super().__init__()
        self.owes = False
        """Whether FSDP2 may hold gradients of this step that it has not reduced."""

    def reduced(self, index: int, param: Tensor) -> None:
        """FSDP2 has added to the parameter's `.grad`."""
        assert param.grad is not None
        self._filled.discard(index)
        self._see(index, param.grad)

    def start_pass(self) -> None:
        """See `GradientCapture.start_pass`."""
        super().start_pass()
        self.owes = True
        if not self.sees_passes:
            self.pass_squares = None

    def forget(self) -> None:
        """See `GradientCapture.forget`."""
        super().forget()
        self.owes = False

    def _listen(self, param: Tensor, index: int) -> RemovableHandle:
        capture = weakref.ref(self)

        def see(param: Tensor) -> None:
            if (alive := capture()) is not None and alive.listening:
                alive.owes = False
                alive.reduced(index, param)

        return param.register_post_accumulate_grad_hook(see)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` holds some of the module's parameters."""
    return any(isinstance(p, DTensor) for p in model.parameters())
