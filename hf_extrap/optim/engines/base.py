"""The engine that is none: one process, or DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..capture import GradientCapture
from ..memory import Buffers
from ..processes import rank_and_world_size


class Engine:
    """What the wrapper must know of whoever holds the parameters.

    Here the base optimizer steps the parameters that are moved, and their gradients are in `.grad`. Other engines show
    their parameters in the same form, so that the wrapper need not know which one it is.

    Attributes:
        name: in words, for errors.
        is_sharded: whether each process holds a part of every parameter, as a DTensor.
        steps_inside: whether the engine calls the base optimizer part by part, on tensors of its own, and then writes
            the parameters itself.
        loss_scale: what the engine itself multiplies the loss by, in float16.
        probes_by_hooks: whether a fresh direction is what the hooks on the leaves see, with no `.grad` written.
        may_swap: whether a parameter may point to other memory while it holds y.
        has_local_gradients: whether a worker has a y and a gradient of its own although its parameters are sharded.
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

    def groups(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The options of each group of the base optimizer, and the parameters that are moved with them."""
        return [(group, group["params"]) for group in self._base.param_groups]

    def params(self) -> list[Tensor]:
        """What is moved, group by group."""
        return [p for _, params in self.groups() for p in params]

    def leaves(self) -> list[Tensor]:
        """The tensors of the graph that `params` stand for, in the same order."""
        return self.params()

    def capture(self) -> GradientCapture:
        """Something that sees the gradients of this engine's workers."""
        return GradientCapture()

    def worker(self) -> tuple[int, int]:
        """The number of the worker that this process is, or is a part of, and how many there are."""
        return rank_and_world_size()

    def gradients(self) -> Buffers:
        """The averaged gradient that this step's base optimizer takes."""
        return [p.grad for p in self.params()]

    def gradient_norm(self) -> float | None:
        """‖ḡ‖ before clipping, where the engine clips by itself and has measured it."""
        return None

    def moved(self) -> None:
        """Let copies of the parameters that the engine keeps follow a move."""

    @contextmanager
    def probing(self) -> Iterator[Callable[[Tensor], None]]:
        """A pass at x whose gradient is no part of the step; gives the function that passes backward."""
        leaves = self.leaves()
        kept = [p.grad for p in leaves]
        # With gradient_as_bucket_view they are views into memory that the averaging of this pass writes to.
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
        """Average over the processes, in place, what the hooks have seen."""

    def collect(self, stepped: Sequence[Tensor]) -> None:
        """Take the averaged gradient from tensors that the base optimizer is about to step (with `steps_inside`)."""

    def follow(self, before: Callable[[bool], None], after: Callable[[bool], None]) -> None:
        """Call these around the steps of an engine that takes them itself.

        Args:
            before: of every micro-batch, told whether a step of the optimizer comes with it.
            after: of every step with `steps_inside`, told whether it was taken.
        """
