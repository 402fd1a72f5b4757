"""All virtual workers of a process in one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from .batch_norm import batch_norms, running_statistics_kept
from .extrapolated import Extrapolated
from .foreach import copy_
from .probing import random_state_kept

MicroBatch = Mapping[str, Any]
Tensors = dict[str, Tensor]
Loss = Callable[[nn.Module, MicroBatch], Tensor]


class BatchedWorkers:
    """Computes K virtual workers at once, each at its own y, where a loop would leave the device idle.

    The pass is `torch.vmap` of loss and gradient over points and micro-batches, stacked along a new first dimension.
    If all workers share a point and their own gradients are not needed, weights are not stacked, and the pass is that
    of one large batch. A step, instead of K rounds of probing, train and backward:

        if optimizer.wants_probe:
            workers.probe(batches)
        losses = workers.backward(batches)
        optimizer.step()

    Iterates equal those of the loop up to rounding, except with dropout, whose masks are drawn for all workers at once
    from the same distribution. Both passes of a fresh step have the same masks. BatchNorm normalizes by each worker's
    batch, and its running statistics are the first worker's.

    Args:
        optimizer: its `virtual_workers` are computed.
        model: holds the parameters; every operation of its loss must have a batching rule.
        loss: (model, micro-batch) → the worker's mean loss, 0-dim.

    Raises:
        ValueError: for recurrent layers, which have no batching rule, or a GradScaler.
    """

    def __init__(self, optimizer: Extrapolated, model: nn.Module, loss: Loss) -> None:
        check_batchable(model)
        if optimizer.grad_scaler is not None and optimizer.grad_scaler.is_enabled():
            raise ValueError("batched workers have no loss scaling; allowed: float32 or bfloat16, or the loop.")
        self.optimizer = optimizer
        self.model = model
        self._call = _LossCall(model, loss)
        self._rooms: dict[int, Tensor] = {}
        self._used: set[str] | None = None

    def probe(self, batches: Sequence[MicroBatch]) -> None:
        """Take the fresh directions of all workers at x; `.grad` and the random state are left as they are."""
        optimizer, direction = self.optimizer, self.optimizer.scheme.direction
        local = direction.local
        optimizer.restore()
        params = optimizer.engine.params()
        with random_state_kept(params, optimizer.config.batch != "independent"), running_statistics_kept(self.model):
            points = [p.expand(len(batches), *p.shape) if local else p for p in params]
            _, gradients = self._pass(points, local, batches)
        for worker in range(len(batches) if local else 1):
            of_worker = [_of_worker(g, worker) if local else _times(g, optimizer.loss_scale) for g in gradients]
            direction.put(worker, of_worker)
            optimizer.in_progress.mark_probed(worker)

    def backward(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Take the gradients at y: their sum times `loss_scale` is added to `.grad`, and x is restored.

        Args:
            batches: one for each worker, whose tensors agree in shape; other values are the same for all.

        Returns:
            The workers' losses, (K,), detached.

        Raises:
            ValueError: where micro-batches differ in shape, or the model has an operation that cannot be batched.
        """
        optimizer, scheme = self.optimizer, self.optimizer.scheme
        step = optimizer.step_count
        captures = scheme.needs_local_gradients(step)
        # The pass needs the memory of spent directions, which are not written to again.
        scheme.release_buffers()
        try:
            points, stacked = self._points_of(len(batches), captures or optimizer.collect_statistics)
            losses, gradients = self._pass(points, stacked, batches)
        finally:
            optimizer.restore()
        if captures:
            for worker in range(len(batches)):
                scheme.local_gradients.put(worker, [_of_worker(g, worker) for g in gradients])
        if optimizer.collect_statistics:
            self._note_passes([g for g in gradients if g is not None])
        params = optimizer.engine.params()
        for p, g in zip(params, gradients, strict=True):
            if g is not None:
                mean = (g.sum(0) if stacked else g) * optimizer.loss_scale
                p.grad = mean if p.grad is None else p.grad + mean
        if scheme.measures_curvature(step) and not scheme.direction.local:
            scheme.local_gradients.put(0, [None if p.grad is None else p.grad.clone() for p in params])
        scheme.hooks.seen = True
        return losses

    def _points_of(self, count: int, apart: bool) -> tuple[list[Tensor], bool]:
        """The workers' y, stacked if they differ or if each one's gradient is needed (`apart`)."""
        optimizer, params = self.optimizer, self.optimizer.engine.params()
        differ = optimizer.config.is_local and optimizer.config.is_active(optimizer.step_count)
        for worker in range(count):
            optimizer.train(worker=worker)
            if differ:
                copy_([self._room(i, p, count)[worker] for i, p in enumerate(params)], params)
        if differ:
            return [self._room(i, p, count) for i, p in enumerate(params)], True
        return [p.expand(count, *p.shape) if apart else p for p in params], apart

    def _room(self, index: int, param: Tensor, count: int) -> Tensor:
        """Memory for every worker's y of a parameter, reused by every step."""
        room = self._rooms.get(index)
        if room is None or room.shape != (count, *param.shape) or room.dtype != param.dtype:
            room = self._rooms[index] = torch.empty((count, *param.shape), dtype=param.dtype, device=param.device)
        return room

    def _pass(
        self, points: list[Tensor], stacked: bool, batches: Sequence[MicroBatch]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Losses and their gradients by the optimizer's parameters: of each worker if `stacked`, else summed."""
        params = self.optimizer.engine.params()
        name_of = {id(p): name for name, p in self._call.named_parameters()}
        leaves = {
            name_of[id(p)]: points[i].detach() for i, p in enumerate(params) if p.requires_grad and id(p) in name_of
        }
        gradients_of = self._of_each_worker if stacked else self._of_all_workers
        try:
            losses, found = gradients_of(leaves, batches)
        except RuntimeError as error:
            if "vmap" not in str(error) and "batching rule" not in str(error):
                raise
            raise ValueError(
                f"{type(self.model).__name__} cannot be batched over workers ({str(error).splitlines()[0]}); allowed: "
                "models whose every operation torch.vmap can batch, or workers one after another."
            ) from error
        return losses.detach(), [found.get(name_of.get(id(p), "")) for p in params]

    def _of_all_workers(self, point: Tensors, batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensors]:
        """Losses at one point, and the gradient of their sum by name, without parameters that the loss does not use."""
        leaves = {name: value.requires_grad_() for name, value in point.items()}
        tensors, constants = stack(batches)
        with self._call.statistics_of_first(len(batches)) as statistics:
            losses = torch.vmap(
                lambda kept, batch: functional_call(self._call, {**leaves, **kept}, ({**constants, **batch},)),
                randomness="different",
            )(statistics, tensors)
        found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        return losses, {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    def _of_each_worker(self, points: Tensors, batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensors]:
        """Losses and gradients of workers at their own points.

        The gradient is taken inside of the vmap: outside, the rule of an embedding would forget its padding.
        """
        if self._used is None:
            # torch.func gives zeros for parameters without a gradient, and a base optimizer would decay those.
            first = {name: point[0].clone() for name, point in points.items()}
            with random_state_kept(self.optimizer.engine.params()), running_statistics_kept(self.model):
                self._used = set(self._of_all_workers(first, batches)[1])
        used = {name: point for name, point in points.items() if name in self._used}
        rest = {name: point for name, point in points.items() if name not in self._used}
        tensors, constants = stack(batches)

        def loss(point: Tensors, others: Tensors, kept: Tensors, batch: Tensors) -> Tensor:
            return functional_call(self._call, {**point, **others, **kept}, ({**constants, **batch},))

        with torch.no_grad(), self._call.statistics_of_first(len(batches)) as statistics:
            gradients, losses = torch.vmap(grad_and_value(loss), randomness="different")(
                used, rest, statistics, tensors
            )
        # One layout: the last bit of a move depends on it, and saving changes it.
        return losses, {name: g.contiguous() for name, g in gradients.items()}

    def _note_passes(self, gradients: list[Tensor]) -> None:
        """Note each worker's squared norm, in the units of its share of the loss."""
        squares = torch.stack(
            [
                torch.linalg.vector_norm(
                    g.flatten(1), dim=1, dtype=torch.promote_types(g.dtype, torch.float32)
                ).square()
                for g in gradients
            ]
        )
        self.optimizer.scheme.hooks.pass_squares = list(squares.sum(0) * self.optimizer.loss_scale**2)


class _LossCall(nn.Module):
    """The loss as a module, whose parameters can be replaced for one call."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: MicroBatch) -> Tensor:
        return self.loss(self.model, batch)

    @contextmanager
    def statistics_of_first(self, count: int) -> Iterator[Tensors]:
        """The running statistics of BatchNorm layers, by name and for each worker; the first worker's are kept."""
        layers = {id(m) for m in batch_norms(self.model) if m.training and m.track_running_stats}
        kept = {
            f"{prefix}.{name}": buffer
            for prefix, module in self.named_modules()
            if id(module) in layers
            for name, buffer in module.named_buffers(recurse=False)
        }
        statistics = {name: buffer.expand(count, *buffer.shape).clone() for name, buffer in kept.items()}
        yield statistics
        with torch.no_grad():
            for name, buffer in kept.items():
                buffer.copy_(statistics[name][0])


def check_batchable(model: nn.Module) -> None:
    """Refuse a model without a batching rule, with a ValueError."""
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise ValueError(
                f"{type(model).__name__} has the recurrent layer {name or type(module).__name__}, which torch.vmap "
                "cannot batch over workers; allowed: models without RNN, GRU and LSTM layers, or workers one after "
                "another."
            )


def stack(batches: Sequence[MicroBatch]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stack the tensors of micro-batches along a new first dimension; other values are those of the first.

    Raises:
        ValueError: where shapes differ.
    """
    first = batches[0]
    tensors: dict[str, Tensor] = {}
    for name in (name for name, value in first.items() if isinstance(value, Tensor)):
        shapes = [tuple(batch[name].shape) for batch in batches]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"the workers' micro-batches differ in the shape of {name!r}: {', '.join(map(str, shapes))}; allowed: "
                "one shape (full batches alone, padded to one length), or workers one after another."
            )
        tensors[name] = torch.stack([batch[name] for batch in batches])
    return tensors, {name: value for name, value in first.items() if name not in tensors}


def _of_worker(gradient: Tensor | None, worker: int) -> Tensor | None:
    return None if gradient is None else gradient[worker]


def _times(gradient: Tensor | None, factor: float) -> Tensor | None:
    return None if gradient is None else gradient * factor
