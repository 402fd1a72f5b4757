"""Default engine: a single process or DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..buffers import BufferPool, Buffers
from ..config import ExtrapConfig
from ..distributed import rank_and_world_size
from ..gradient_hooks import GradientHooks


class Engine:
    """Gives access to the parameters and gradients that a distributed engine holds.

    Here the base optimizer steps the parameters that are moved, and their gradients are in `.grad`. Other engines
    present their parameters in the same form.

    Attributes:
        name: for errors.
        is_sharded: whether each process holds a part of every parameter, as a DTensor.
        steps_inside: whether the engine calls the base optimizer itself, on tensors of its own, and then writes the
            parameters.
        loss_scale: factor by which the engine multiplies the loss, in float16.
        probes_by_hooks: whether a fresh direction is what the hooks on the leaves see, with no `.grad` written.
        may_swap: whether a parameter may point to other memory while it holds y.
        has_local_gradients: whether a worker has its own y and gradient although its parameters are sharded.
    """

    name = "one process or DDP"
    is_sharded = False
    steps_inside = False
    probes_by_hooks = False
    may_swap = True
    has_local_gradients = False

    @property
    def loss_scale(self) -> float:
        """See the attributes."""
        return 1.0

    def __init__(self, base: Optimizer) -> None:
        self._base = base

    def check(self, config: ExtrapConfig) -> None:
        """Refuse a scheme that this engine cannot carry out.

        Raises:
            ValueError: in one sentence that names the field and what is allowed.
        """

    def groups(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The options of each group of the base optimizer, and the parameters that are moved with them."""
        return [(group, group["params"]) for group in self._base.param_groups]

    def params(self) -> list[Tensor]:
        """The tensors that are moved, group by group."""
        return [p for _, params in self.groups() for p in params]

    def leaves(self) -> list[Tensor]:
        """The leaf tensors of the graph that `params` stand for, in the same order."""
        return self.params()

    def hooks(self, pool: BufferPool) -> GradientHooks:
        """New hooks that see the gradients of this engine's workers."""
        return GradientHooks(pool)

    def worker(self) -> tuple[int, int]:
        """The number of the worker that this process belongs to, and the number of workers."""
        return rank_and_world_size()

    def number_of(self, virtual_worker: int) -> int:
        """The number of a virtual worker among those of all processes."""
        rank, world_size = self.worker()
        return virtual_worker * world_size + rank

    def gradients(self) -> Buffers:
        """The averaged gradient that the base optimizer steps with."""
        return [p.grad for p in self.params()]

    def gradient_norm(self) -> float | None:
        """‖ḡ‖ before clipping, where the engine clips and has measured it."""
        return None

    def moved(self) -> None:
        """Update or drop copies of the parameters that the engine keeps, after a move."""

    @contextmanager
    def probing(self) -> Iterator[Callable[[Tensor], None]]:
        """A pass at x whose gradient is no part of the step; yields the function that starts a backward pass."""
        leaves = self.leaves()
        kept = [p.grad for p in leaves]
        # With gradient_as_bucket_view they are views of memory that the all-reduce of this pass overwrites.
        contents = [grad.clone() if grad is not None and grad._is_view() else None for grad in kept]
        for p in leaves:
            p.grad = None
        try:
            yield lambda loss: loss.backward()
        finally:
            for p, grad, content in zip(leaves, kept, contents, strict=True):
                p.grad = grad if grad is None or content is None else grad.copy_(content)

    def probed(self) -> Buffers:
        """The averaged gradient of the passes inside `probing`, before it ends."""
        return self.gradients()

    def average(self, direction: Sequence[Tensor | None]) -> None:
        """Average a direction that the hooks have seen over the processes, in place."""

    def collect(self, stepped: Sequence[Tensor]) -> None:
        """Copy the averaged gradient from tensors that the base optimizer is about to step (with `steps_inside`)."""

    def follow(self, before: Callable[[bool], None], after: Callable[[bool], None]) -> None:
        """Register callbacks around the steps of an engine.

        Args:
            before: called for every micro-batch, with whether a step of the optimizer comes with it.
            after: called for every step with `steps_inside`, with whether it was taken.
        """
