"""FSDP2: parameters sharded by `torch.distributed.fsdp.fully_shard`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..buffers import BufferPool
from ..gradient_hooks import GradientHooks
from .base import Engine


class FSDPEngine(Engine):
    """Each process moves its own shards; the next forward pass gathers the moved parameters."""

    name = "FSDP2"
    may_swap = False
    is_sharded = True

    def __init__(self, model: nn.Module, base: Optimizer) -> None:
        super().__init__(base)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._hooks: ShardHooks | None = None

    def moved(self) -> None:
        """See `Engine.moved`: drops gathered parameters, which the root keeps after a forward pass without backward."""
        for module in self._modules:
            module.reshard()

    def hooks(self, pool: BufferPool) -> GradientHooks:
        """See `Engine.hooks`."""
        self._hooks = ShardHooks(pool)
        return self._hooks

    @contextmanager
    def probing(self) -> Iterator[Callable[[Tensor], None]]:
        """See `Engine.probing`.

        Raises:
            RuntimeError: where FSDP2 has not reduced a gradient yet, and would mix those at x and at y.
        """
        if self._hooks is not None and self._hooks.is_pending:
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


class ShardHooks(GradientHooks):
    """Sees this process's shard of the averaged gradient that the step has accumulated so far.

    For a sharded parameter FSDP2 runs the hooks of `register_post_accumulate_grad_hook` alone, after it has added to
    `.grad`. The gradient of a single pass, and its squared norm, are not visible.

    Attributes:
        is_pending: whether FSDP2 may hold gradients of this step that it has not reduced.
    """

    sees_passes = False

    def __init__(self, pool: BufferPool) -> None:
        super().__init__(pool)
        self.is_pending = False

    def reduced(self, index: int, param: Tensor) -> None:
        """FSDP2 has added to the parameter's `.grad`."""
        assert param.grad is not None
        self._filled.discard(index)
        self._see(index, param.grad)

    def start_pass(self, params: Sequence[Tensor], with_squares: bool) -> None:
        """See `GradientHooks.start_pass`."""
        super().start_pass(params, with_squares and self.sees_passes)
        self.is_pending = True

    def forget(self) -> None:
        """See `GradientHooks.forget`."""
        super().forget()
        self.is_pending = False

    def _register(self, param: Tensor, index: int) -> RemovableHandle:
        hooks = weakref.ref(self)

        def see(param: Tensor) -> None:
            if (alive := hooks()) is not None and alive.listening:
                alive.is_pending = False
                alive.reduced(index, param)

        return param.register_post_accumulate_grad_hook(see)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` holds some of the module's parameters."""
    return any(isinstance(p, DTensor) for p in model.parameters())
