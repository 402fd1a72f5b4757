"""Local gradient hooks: where the gradient of this process is seen, before it is averaged."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from .buffers import BufferPool, Buffers


class GradientHooks:
    """Copies the gradient of each parameter during the backward pass, and notes the squared norm of every pass.

    A hook on a parameter runs before its gradient is accumulated, and so before DistributedDataParallel, or any other
    engine that holds whole parameters, averages it. One kind of hook serves a single process, virtual workers and
    data-parallel processes.

    Args:
        pool: where new buffers come from.

    Attributes:
        listening: whether gradients belong to a step in progress.
        seen: whether the step in progress has any gradient.
        is_aside: whether a pass inside `aside` is in progress.
        takes_sparse: whether gradients may be sparse, since none of them is a direction.
        pass_squares: ‖gradient‖² of every pass, 0-dim each, while statistics are collected; else None.
    """

    def __init__(self, pool: BufferPool) -> None:
        self.listening = False
        self.seen = False
        self.is_aside = False
        self.takes_sparse = False
        self.pass_squares: list[Tensor] | None = None
        self._pool = pool
        self._handles: dict[int, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
        self._into: Buffers | None = None
        self._filled: set[int] = set()
        self._scale = 1.0
        self._factors: dict[torch.dtype, Tensor] = {}
        self._dtype: torch.dtype | None = None
        self._pass_started = False

    def attach(self, params: Sequence[Tensor]) -> None:
        """Register a hook on every parameter that requires a gradient and has none yet."""
        for index, param in enumerate(params):
            known = self._handles.get(index)
            if known is not None and known[0]() is param:
                continue
            if known is not None:
                known[1].remove()
                del self._handles[index]
            if param.requires_grad:
                self._handles[index] = (weakref.ref(param), self._register(param, index))

    def _register(self, param: Tensor, index: int) -> RemovableHandle:
        return param.register_hook(_hook(weakref.ref(self), index))

    def into(self, buffers: Buffers, filled: set[int], scale: float, dtype: torch.dtype | None) -> None:
        """Choose where gradients are copied from now on.

        Args:
            buffers: one per parameter, None where there is none yet.
            filled: indices of buffers that hold a gradient, which is added to; changed in place.
            scale: multiplies a gradient, to remove the loss scale.
            dtype: of new buffers; None for the gradient's own.
        """
        self._into, self._filled, self._scale, self._dtype = buffers, filled, scale, dtype
        self._factors.clear()
        # Allocation during the backward pass would take three times as long.
        for index, (known, _) in self._handles.items():
            param = known()
            if buffers[index] is None and param is not None and not isinstance(param, DTensor):
                buffers[index] = self._pool.find(index, param, dtype)

    def start_pass(self, params: Sequence[Tensor], with_squares: bool) -> None:
        """Gradients belong to the step from now on.

        Args:
            params: that hooks are registered on.
            with_squares: note ‖gradient‖² of every pass of this step.
        """
        self.attach(params)
        if with_squares and self.pass_squares is None:
            self.pass_squares = []
        self.listening = True
        self._pass_started = False

    def stop(self) -> None:
        """Gradients no longer belong to the step."""
        self.listening = False
        self._into = None

    def forget(self) -> None:
        """Start a step without any gradient."""
        self.stop()
        self.seen = False
        self.pass_squares = None
        self._pass_started = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Gradients inside are no part of the step: `seen` and `pass_squares` stay as they are."""
        seen, squares = self.seen, self.pass_squares
        self.pass_squares = None
        self.listening = self.is_aside = True
        try:
            yield
        finally:
            self.stop()
            self.is_aside = False
            self.seen, self.pass_squares = seen, squares

    def _see(self, index: int, grad: Tensor) -> None:
        if not self.listening:
            return
        self.seen = True
        if grad.requires_grad:
            grad = grad.detach()
        if grad.layout is not torch.strided and not self.takes_sparse:
            raise RuntimeError("extrapolation needs dense gradients: build the embedding with sparse=False.")
        if self.pass_squares is not None:
            self._note_square(grad, self.pass_squares)
        if self._into is None:
            return
        buffer = self._into[index]
        if buffer is None:
            buffer = self._into[index] = self._pool.take(index, self._like(index, grad), self._dtype or grad.dtype)
        elif index in self._filled:
            buffer.add_(grad, alpha=self._scale)
            return
        if self._scale == 1:
            buffer.copy_(grad)
        else:
            torch.mul(grad, self._factor(grad.dtype), out=buffer)
        self._filled.add(index)

    def _factor(self, dtype: torch.dtype) -> Tensor:
        """The scale as a CPU tensor: half the time of a number for a small gradient, and no synchronization."""
        if dtype not in self._factors:
            wide = torch.promote_types(dtype, torch.float32)
            self._factors[dtype] = torch.tensor(self._scale, dtype=wide)
        return self._factors[dtype]

    def _like(self, index: int, grad: Tensor) -> Tensor:
        """The parameter, so that y can be written over its layout: a convolution's gradient may have another one."""
        param = self._handles[index][0]()
        return param if param is not None and param.shape == grad.shape and not isinstance(grad, DTensor) else grad

    def _note_square(self, grad: Tensor, squares: list[Tensor]) -> None:
        wide = torch.promote_types(grad.dtype, torch.float32)
        values = grad.coalesce().values() if grad.is_sparse else grad
        square = torch.linalg.vector_norm(values, dtype=wide).square()
        if not self._pass_started:
            squares.append(square)
            self._pass_started = True
        else:
            squares[-1] += square.to(squares[-1].device)


def _hook(hooks: weakref.ref[GradientHooks], index: int) -> Callable[[Tensor], None]:
    """The hook holds a weak reference, so that a parameter does not keep the optimizer alive."""

    def see(grad: Tensor) -> None:
        if (alive := hooks()) is not None:
            alive._see(index, grad)

    return see
