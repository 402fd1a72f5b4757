"""A mean loss as a function of the parameters: its gradient, Hessian-vector products, and values along a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

Differentiation = Literal["autograd", "differences"]
BatchNorm = Literal["batch", "running"]


class CurvatureError(ValueError):
    """The curvature cannot be measured here, for a reason that the message tells."""


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers as one vector, copied and detached."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`: parts of a vector in the shapes of the tensors `like`."""
    parts = torch.split(vector, [t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


class MeanLoss:
    """The mean over fixed batches of a model's loss, as a function of its parameters: n numbers, one flat vector.

    Dropout is off. Parameters, their `.grad`, running statistics and the random state are left as they were.

    Args:
        model: with parameters in float32 or float64, all on one device.
        loss: the scalar mean loss of one batch.
        batches: what `loss` takes, one after another; each counts the same. With an only batch the graph of its
            gradient is kept from one Hessian product to the next, which halves their time.
        differentiation: how the gradient is differentiated: `autograd`, a second backward pass; or `differences`,
            central differences of the gradient, for models whose operations have none.
        batch_norm: whether BatchNorm uses the statistics of each `batch`, as in training, or the `running` ones, as in
            evaluation.
        average: averages a tensor over processes; called by all of them alike.

    Raises:
        CurvatureError: for an unknown mode, no batch, or parameters in half precision.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        batches: Sequence[Any],
        *,
        differentiation: Differentiation = "autograd",
        batch_norm: BatchNorm = "batch",
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if differentiation not in ("autograd", "differences"):
            raise CurvatureError(f"differentiation is {differentiation!r}; allowed: autograd, differences.")
        if batch_norm not in ("batch", "running"):
            raise CurvatureError(f"batch_norm is {batch_norm!r}; allowed: batch, running.")
        if not batches:
            raise CurvatureError("there is no batch to measure the curvature of the loss on.")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        halves = {str(p.dtype).removeprefix("torch.") for p in self.parameters if p.dtype.itemsize < 4}
        if halves:
            raise CurvatureError(f"parameters are {halves.pop()}; allowed for curvature: float32 or float64.")
        self.model, self.loss, self.batches = model, loss, batches
        self.differentiation, self.batch_norm = differentiation, batch_norm
        self._average = average or (lambda tensor: tensor)
        self._checked = False
        self._graph: tuple[list[int], Sequence[Tensor]] | None = None

    @property
    def point(self) -> Tensor:
        """The parameters, copied into one vector, (n,)."""
        return flatten(self.parameters)

    def value(self) -> float:
        """The mean loss."""
        with torch.no_grad(), self._measuring():
            losses = torch.stack([self.loss(batch).double() for batch in self.batches])
        return float(self._average(losses.mean()))

    def gradient(self) -> Tensor:
        """The gradient of the mean loss, (n,)."""
        total = torch.zeros_like(self.point)
        with torch.enable_grad(), self._measuring():
            for batch in self.batches:
                total += flatten(grad(self.loss(batch), self.parameters, materialize_grads=True))
        return self._average(total / len(self.batches))

    def hessian_product(self, vector: Tensor) -> Tensor:
        """The Hessian of the mean loss times a vector, (n,).

        Raises:
            CurvatureError: if an operation of the model cannot be differentiated twice, or the product is not finite.
        """
        product = self._by_autograd(vector) if self.differentiation == "autograd" else self._by_differences(vector)
        if not torch.isfinite(product).all():
            raise CurvatureError("the Hessian of the loss is not finite at these parameters: the run has diverged.")
        return product

    def product_error(self, vector: Tensor) -> float:
        """How far `hessian_product(vector)` is from another way of computing it, relative to its length.

        For `autograd` that is central differences; for `differences`, Richardson's estimate from twice the step. Kinks
        of the loss, as of ReLU on few samples, make differences uncertain.
        """
        product = self.hessian_product(vector)
        if self.differentiation == "autograd":
            error = product - self._by_differences(vector)
        else:
            error = (product - self._by_differences(vector, step=2.0)) / 3
        return float(error.norm() / product.norm())

    def along(self, direction: Tensor, lengths: Sequence[float], tick: Callable[[], Any] = lambda: None) -> list[float]:
        """The mean loss at x + length · direction, (n,), for each length; `tick` is called after each."""
        values = []
        for length in lengths:
            with self._moved(length * direction):
                values.append(self.value())
            tick()
        return values

    def _by_autograd(self, vector: Tensor) -> Tensor:
        parts = split(vector, self.parameters)
        total = torch.zeros_like(self.point)
        try:
            with torch.enable_grad(), self._measuring():
                for batch in self.batches:
                    curved = [(g, v) for g, v in zip(self._graph_of(batch), parts, strict=True) if g.requires_grad]
                    if curved:
                        gradient, vectors = zip(*curved, strict=True)
                        keep = len(self.batches) == 1
                        total += flatten(grad(gradient, self.parameters, vectors, keep, materialize_grads=True))
        except (RuntimeError, NotImplementedError) as error:
            if "derivative" not in str(error) and "differentiate twice" not in str(error):
                raise
            raise _not_twice(" ".join(str(error).split())[:120]) from error
        return self._average(total / len(self.batches))

    def _graph_of(self, batch: Any) -> Sequence[Tensor]:
        """The gradient on one batch, to be differentiated again; that of an only batch is kept between products."""
        versions = [p._version for p in self.parameters]
        if self._graph is not None and self._graph[0] == versions:
            return self._graph[1]
        self._graph = None
        gradient = grad(self.loss(batch), self.parameters, create_graph=True, materialize_grads=True)
        if not self._checked:
            _refuse_once_differentiable(gradient)
            self._checked = True
        if len(self.batches) == 1:
            self._graph = versions, gradient
        return gradient

    def _by_differences(self, vector: Tensor, step: float = 1.0) -> Tensor:
        """(g(x + h v) − g(x − h v)) / 2h with ‖h v‖ = step · ε^⅓ ‖x‖ / 10, which balances truncation and rounding."""
        share = 0.1 * torch.finfo(vector.dtype).eps ** (1 / 3)
        h = step * share * float(self.point.norm()) / float(vector.norm())
        with self._moved(h * vector):
            ahead = self.gradient()
        with self._moved(-h * vector):
            behind = self.gradient()
        return (ahead - behind) / (2 * h)

    @contextmanager
    def _moved(self, displacement: Tensor) -> Iterator[None]:
        self._graph = None
        kept = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                for p, d in zip(self.parameters, split(displacement, self.parameters), strict=True):
                    p.add_(d)
            yield
        finally:
            with torch.no_grad():
                for p, x in zip(self.parameters, kept, strict=True):
                    p.copy_(x)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Modes and kernels in which the loss is deterministic and can be differentiated twice."""
        modules = list(self.model.modules())
        modes = [module.training for module in modules]
        norms = [m for m in modules if isinstance(m, _BatchNorm) and self.batch_norm == "batch"]
        tracking = [m.track_running_stats for m in norms]
        # Accelerate puts a forward that casts to half precision in the way of the model's own.
        casting = vars(self.model).pop("forward") if "_original_forward" in vars(self.model) else None
        try:
            self.model.eval()
            for norm in norms:
                norm.training, norm.track_running_stats = True, False
            with ExitStack() as kernels:
                kernels.enter_context(torch.autocast(self.parameters[0].device.type, enabled=False))
                # Fused attention and cuDNN's recurrent layers have no second derivative.
                kernels.enter_context(sdpa_kernel(SDPBackend.MATH))
                if any(isinstance(module, nn.RNNBase) for module in modules):
                    kernels.enter_context(torch.backends.cudnn.flags(enabled=False))
                yield
        finally:
            if casting is not None:
                self.model.forward = casting
            for norm, tracks in zip(norms, tracking, strict=True):
                norm.track_running_stats = tracks
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode


def _not_twice(reason: str) -> CurvatureError:
    return CurvatureError(f"the model cannot be differentiated twice ({reason}); set differentiation to 'differences'.")


def _refuse_once_differentiable(gradients: Iterable[Tensor]) -> None:
    """Look for operations marked `once_differentiable`: autograd leaves their part out without a word."""
    waiting = [g.grad_fn for g in gradients]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::Error":
            raise _not_twice("an operation is marked once_differentiable")
        following = {after for after, _ in node.next_functions} - seen
        seen |= following
        waiting += following
