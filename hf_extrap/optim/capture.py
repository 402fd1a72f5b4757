"""Where this process's own gradient is seen: hooks on the parameters, before any averaging."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from .spares import Spares


class GradientCapture:
    """Copies each parameter's gradient as backward makes it, and keeps the squared norm of every pass.

    A hook on a parameter runs before its gradient is accumulated, so before DistributedDataParallel, or any other
    engine that keeps whole parameters, averages it. One kind of hook therefore serves a single process, virtual
    workers and data-parallel processes.
    """

    def __init__(self) -> None:
        self._handles: dict[int, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
        self._into: list[Tensor | None] | None = None
        self._filled: set[int] = set()
        self._scale = 1.0
        self._factors: dict[torch.dtype, Tensor] = {}
        self._dtype: torch.dtype | None = None
        self.spares = Spares()
        """Where new buffers come from."""
        self.listening = False
        """Whether gradients that come belong to a step in progress."""
        self.seen = False
        """Whether any has come since `forget`."""
        self.pass_squares: list[Tensor] | None = None
        """‖gradient‖² of every pass since statistics were asked for; None while they are not."""
        self._pass_started = False

    def attach(self, params: Sequence[Tensor]) -> None:
        """Put a hook on every parameter that takes a gradient and has none yet."""
        for index, param in enumerate(params):
            known = self._handles.get(index)
            if known is not None and known[0]() is param:
                continue
            if known is not None:
                known[1].remove()
                del self._handles[index]
            if param.requires_grad:
                self._handles[index] = (weakref.ref(param), self._listen(param, index))

    def _listen(self, param: Tensor, index: int) -> RemovableHandle:
        return param.register_hook(_hook(weakref.ref(self), index))

    def into(self, buffers: list[Tensor | None], filled: set[int], scale: float, dtype: torch.dtype | None) -> None:
        """Choose where gradients go from now on.

        Args:
            buffers: one a parameter, None where there is none yet.
            filled: the indices of buffers that hold something already, which is added to; changed in place.
            scale: a gradient is multiplied by it, which takes out the loss scale.
            dtype: of new buffers; None for the gradient's own.
        """
        self._into, self._filled, self._scale, self._dtype = buffers, filled, scale, dtype
        self._factors.clear()
        self._lay_out(buffers)

    def _lay_out(self, buffers: list[Tensor | None]) -> None:
        """Put spare memory where there is none: amid a pass that would take three times as long."""
        for index, (known, _) in self._handles.items():
            param = known()
            if buffers[index] is None and param is not None and not isinstance(param, DTensor):
                buffers[index] = self.spares.find(index, param, self._dtype)

    def start_pass(self) -> None:
        """What comes next belongs to the step, and is a pass of its own in `pass_squares`."""
        self.listening = True
        self._pass_started = False

    def stop(self) -> None:
        """What comes next does not belong to the step."""
        self.listening = False
        self._into = None

    def forget(self) -> None:
        """Start a step: nothing seen, nothing wanted."""
        self.stop()
        self.seen = False
        self.pass_squares = None
        self._pass_started = False

    def _see(self, index: int, grad: Tensor) -> None:
        if not self.listening:
            return
        self.seen = True
        if grad.requires_grad:
            grad = grad.detach()
        if grad.layout is not torch.strided:
            raise RuntimeError("extrapolation needs dense gradients: build the embedding with sparse=False.")
        if self.pass_squares is not None:
            self._square(grad, self.pass_squares)
        if self._into is None:
            return
        buffer = self._into[index]
        if buffer is None:
            buffer = self._into[index] = self.spares.take(index, self._like(index, grad), self._dtype or grad.dtype)
        elif index in self._filled:
            buffer.add_(grad, alpha=self._scale)
            return
        if self._scale == 1:
            buffer.copy_(grad)
        else:
            torch.mul(grad, self._factor(grad.dtype), out=buffer)
        self._filled.add(index)

    def _factor(self, dtype: torch.dtype) -> Tensor:
        """The scale as a tensor on the CPU: half the time of a number for a small gradient, and nobody waits for it."""
        if dtype not in self._factors:
            wide = torch.promote_types(dtype, torch.float32)
            self._factors[dtype] = torch.tensor(self._scale, dtype=wide)
        return self._factors[dtype]

    def _like(self, index: int, grad: Tensor) -> Tensor:
        """The parameter, over whose layout y can be written, as gradients of convolutions have another one."""
        param = self._handles[index][0]()
        return param if param is not None and param.shape == grad.shape and not isinstance(grad, DTensor) else grad

    def _square(self, grad: Tensor, squares: list[Tensor]) -> None:
        wide = torch.promote_types(grad.dtype, torch.float32)
        square = torch.linalg.vector_norm(grad, dtype=wide).square()
        if not self._pass_started:
            squares.append(square)
            self._pass_started = True
        else:
            squares[-1] += square.to(squares[-1].device)


def _hook(capture: weakref.ref[GradientCapture], index: int) -> Callable[[Tensor], None]:
    """A hook that keeps nothing alive: parameters outlive optimizers."""

    def see(grad: Tensor) -> None:
        if (alive := capture()) is not None:
            alive._see(index, grad)

    return see
