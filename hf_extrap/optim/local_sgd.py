"""Post-local SGD: each worker steps its own copy of x, and the copies are averaged every H steps."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from .distributed import rank_and_world_size
from .foreach import copy_
from .wrapper import OptimizerWrapper

logger = logging.getLogger(__name__)


class LocalSGD(OptimizerWrapper):
    """Steps as the base optimizer until `start`; from then on each worker steps its own copy of x.

    The workers are the `virtual_workers` of this process, times the processes of torch.distributed if it is
    initialized. After `start` a training step is

        for k in range(virtual_workers):
            with optimizer.worker(k):       # x → worker k's copy
                loss(batch).backward()      # its mean loss; under DistributedDataParallel in `model.no_sync()`
                                            # on leaving: its step, then back to x
        optimizer.step()                    # every local_steps times, x and all copies ← the mean of the copies

    Between steps the parameters hold x, the mean at the last averaging, bit-identical in all processes; `settle` sets
    them to the current mean of the copies, for evaluations, and leaves the copies. Each worker has its own optimizer
    state (its momentum), which starts as a copy of the common one and is not averaged, and uses the current learning
    rate of the groups. Memory: a copy of x and of the state for each virtual worker, and one more x.

    Args:
        base: the optimizer that steps x, and the copies. Its groups and defaults are this one's, and so is its state,
            which is the first worker's after `start`. Counters in its groups must count alike for all workers.
        local_steps: H, steps from one averaging to the next. With 1 and plain SGD this is data-parallel SGD.
        virtual_workers: workers that this process plays, one after another.

    Raises:
        ValueError: for fewer than one step or worker, or a base that has modes (schedule-free).

    Source: Lin, Stich, Patel, Jaggi, "Don't use large mini-batches, use local SGD", ICLR 2020.
    """

    def __init__(self, base: Optimizer, local_steps: int, *, virtual_workers: int = 1) -> None:
        for name, value in (("local_steps", local_steps), ("virtual_workers", virtual_workers)):
            if value < 1:
                raise ValueError(f"{name} is {value}; allowed: a whole number >= 1.")
        if hasattr(base, "train"):
            raise ValueError(
                f"base is a {type(base).__name__}, which moves the parameters by train() and eval(); allowed for local "
                "SGD: an optimizer without such modes."
            )
        self.base = base
        self.local_steps = local_steps
        self.virtual_workers = virtual_workers
        self._copies: list[list[Tensor]] = []
        self._states: list[Any] = []
        self._fields: list[dict[str, Any]] | None = None
        self.stop()
        self._initialize()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none)

    def _load_whole_state(self, state_dict: dict[str, Any]) -> None:
        """Local steps end until `start` or `load_local_state_dict`."""
        self.stop()
        super()._load_whole_state(state_dict)

    # Local steps

    @property
    def is_local(self) -> bool:
        """Whether each worker steps its own copy."""
        return bool(self._copies)

    @torch.no_grad()
    def start(self) -> None:
        """Give every worker a copy of x and of the optimizer's state."""
        if self.is_local:
            return
        params = self._params()
        self._copies = [[p.detach().clone() for p in params] for _ in range(self.virtual_workers)]
        self._states = [self.base.state, *(_copied(self.base.state) for _ in self._copies[1:])]

    def stop(self) -> None:
        """End local steps; x and the first worker's state remain. Call `average` before, to keep the others' steps."""
        self._copies = []
        self._states = []
        self._fields = None
        self._steps_since_average = 0
        self._moved = False

    @contextmanager
    def worker(self, worker: int, *, loss_scale: float = 1.0, max_grad_norm: float | None = None) -> Iterator[None]:
        """The worker's pass, forward and backward, and its step with its own gradient.

        A gradient that is not finite leaves the worker's copy and state as they are. `.grad` is added to as by an
        ordinary backward pass, so that after all workers it holds the sum of their gradients, which nothing steps with.

        Args:
            worker: of this process, in range(virtual_workers).
            loss_scale: what its mean loss is multiplied by before backward.
            max_grad_norm: its gradient is clipped to this norm; None or 0 for no clipping.

        Raises:
            RuntimeError: before `start`.
            ValueError: for a worker that this process does not have.
        """
        if not self.is_local:
            raise RuntimeError("worker(k) was called before start(); allowed: only after start().")
        if not 0 <= worker < self.virtual_workers:
            raise ValueError(f"worker is {worker}; allowed: 0 to {self.virtual_workers - 1} (virtual_workers).")
        params, own = self._params(), self._copies[worker]
        x = [p.detach().clone() for p in params]
        earlier = [p.grad for p in params]
        for p in params:
            p.grad = None
        copy_(params, own)
        try:
            yield
            grads = [p.grad for p in params]
            for p, grad in zip(params, grads, strict=True):
                p.grad = None if grad is None else grad / loss_scale
            if not torch.isfinite(clip_grad_norm_(params, max_grad_norm or math.inf)):
                logger.warning("worker %d skips a step: its gradient is not finite", worker)
                grads = [None if grad is None else torch.zeros_like(grad) for grad in grads]
            else:
                self._step_base(worker)
                copy_(own, params)
            earlier = [b if a is None else a if b is None else a + b for a, b in zip(earlier, grads, strict=True)]
        finally:
            copy_(params, x)
            for p, total in zip(params, earlier, strict=True):
                p.grad = total

    def _step_base(self, worker: int) -> None:
        """The base optimizer's step with the worker's state; counters in the groups advance once for all workers."""
        groups = self.base.param_groups
        if self._fields is None:
            self._fields = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        for group, fields in zip(groups, self._fields, strict=True):
            group.update(fields)
        self.base.state = self._states[worker]
        self.base.step()
        # Some optimizers replace their state when they make it.
        self._states[worker] = self.base.state
        self.base.state = self._states[0]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The base optimizer's step; after `start` the end of a step of all workers, with an averaging where it is due.

        Then it is a collective call every `local_steps` times.
        """
        if not self.is_local:
            return self.base.step() if closure is None else self.base.step(closure)
        if closure is not None:
            raise ValueError("closure is given; allowed after start(): none, since workers step inside worker(k).")
        self._fields = None
        self._moved = True
        self._steps_since_average += 1
        if self._steps_since_average >= self.local_steps:
            self.average()
        return None

    def average(self) -> None:
        """Make x and every worker's copy the mean of all copies, and count the steps anew; a collective call."""
        self.settle()
        for own in self._copies:
            copy_(own, self._params())
        self._steps_since_average = 0

    @torch.no_grad()
    def settle(self) -> None:
        """Make x the mean of all copies as they are now, and leave the copies; a collective call."""
        if not self._moved:
            return
        mean = [c.to(torch.promote_types(c.dtype, torch.float32), copy=True) for c in self._copies[0]]
        for own in self._copies[1:]:
            torch._foreach_add_(mean, own)
        torch._foreach_div_(mean, self.virtual_workers)
        if dist.is_available() and dist.is_initialized():
            average_parameters(iter(mean), None)  # type: ignore[arg-type]
        copy_(self._params(), mean)
        self._moved = False

    def local_state_dict(self) -> dict[str, Any]:
        """The state of each of this process's workers, to be saved after `average`; empty before `start`."""
        workers = []
        for state in self._states:
            self.base.state = state
            workers.append(self.base.state_dict())
        if self._states:
            self.base.state = self._states[0]
        return {"workers": workers, "processes": rank_and_world_size()[1]}

    def load_local_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start from x with the states that `local_state_dict` gave; those of other workers are left out, with a
        warning, and all workers start with the first one's."""
        workers, processes = state_dict["workers"], state_dict["processes"]
        self.stop()
        if not workers:
            return
        self.start()
        if (len(workers), processes) != (self.virtual_workers, rank_and_world_size()[1]):
            logger.warning(
                "the checkpoint's local steps had %d × %d workers and this run has %d × %d: all start with the first "
                "one's optimizer state",
                processes,
                len(workers),
                rank_and_world_size()[1],
                self.virtual_workers,
            )
            return
        # The first one comes last, and its groups stay.
        for worker in reversed(range(len(workers))):
            self.base.load_state_dict(workers[worker])
            self._states[worker] = self.base.state

    def __repr__(self) -> str:
        return f"LocalSGD({self.base!r}, local_steps={self.local_steps}, virtual_workers={self.virtual_workers})"


def _copied(state: Any) -> Any:
    """A state by parameter, the parameters themselves aside."""
    return defaultdict(dict, {p: copy.deepcopy(of_parameter) for p, of_parameter in state.items()})
