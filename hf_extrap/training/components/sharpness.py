"""The largest curvature during training: measured at x at every evaluation, on the last training batches."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hf_extrap.training.curvature.lanczos import largest_eigenpair
from hf_extrap.training.curvature.mean_loss import BatchNorm, CurvatureError, Differentiation, MeanLoss
from hf_extrap.training.curvature.preconditioner import adam_preconditioner, preconditioned

from .base import Component, Inputs
from .carried_state import EVALUATION, State

logger = logging.getLogger(__name__)

TOLERANCE = 0.05
"""Residual, as a share of the eigenvalue, at which a measurement during training ends."""
SUBSPACE = 6
"""Lanczos vectors of a measurement during training: most spectra have outliers, which a few products find."""

Sample = tuple[Inputs, State | None]


class Sharpness(Component):
    """Logs `extrap/sharpness`, λ_max(H), and for Adam-like bases `extrap/preconditioned_sharpness`, λ_max(P^½ H P^½).

    H is the Hessian, at x, of the mean loss of the last `sharpness_batches` training micro-batches of every process,
    without dropout and with BatchNorm's statistics of each batch. A measurement does not change the training. `recent`
    holds those micro-batches, each with the recurrent state that its worker begins with.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.recent: deque[Sample] = deque(maxlen=trainer.args.sharpness_batches)
        self._measured_at = -1

    def before_step(self, batches: Sequence[Inputs]) -> None:
        if self.recent.maxlen:
            carried = self.trainer.carried
            self.recent.extend((dict(inputs), carried.of(f"worker {i}")) for i, inputs in enumerate(batches))

    def before_evaluate(self) -> None:
        """While training, log a row with the sharpness, once a step."""
        step = self.trainer.state.global_step
        if self.trainer.is_in_train and self.recent and self._measured_at != step:
            self._measured_at = step
            self.trainer.log(self._measured())

    def mean_loss(
        self, samples: Sequence[Sample], differentiation: Differentiation = "autograd", batch_norm: BatchNorm = "batch"
    ) -> MeanLoss:
        """The mean of the Trainer's loss over batches, each with its recurrent state, and over processes."""
        return MeanLoss(
            self.trainer.model,
            lambda sample: self.trainer.loss_of(*sample),
            samples,
            differentiation=differentiation,
            batch_norm=batch_norm,
            average=lambda tensor: self.trainer.accelerator.reduce(tensor, "mean"),
        )

    def samples(self, loader: Iterable[Inputs], count: int, streams: int = 1) -> list[Sample]:
        """The first `count` batches of a loader, each with the recurrent state that the model reaches it with.

        `streams` workers take the batches in turn, each with its own state.
        """
        trainer, carried = self.trainer, self.trainer.carried
        samples: list[Sample] = []
        states: dict[int, State | None] = {}
        was_training = trainer.model.training
        trainer.model.eval()
        for index, inputs in enumerate(islice(loader, count)):
            worker = index % streams
            samples.append((inputs, states.get(worker)))
            if trainer.args.carry_state:
                carried.put(EVALUATION, states.get(worker))
                with torch.no_grad():
                    trainer.compute_loss(trainer.model, trainer.prepare(inputs))
                states[worker] = carried.of(EVALUATION)
        carried.put(EVALUATION, None)
        trainer.model.train(was_training)
        return samples

    def preconditioner(self, mean_loss: MeanLoss) -> Tensor | None:
        """P of the optimizer, see `adam_preconditioner`."""
        optimizer = self.trainer.extrapolated or self.trainer.optimizer
        return None if optimizer is None else adam_preconditioner(optimizer, mean_loss.parameters)

    def _measured(self) -> dict[str, float]:
        mean_loss = self.mean_loss(self.recent)
        logs = {"extrap/sharpness": self._largest(mean_loss.hessian_product, mean_loss)}
        if (preconditioner := self.preconditioner(mean_loss)) is not None:
            product = preconditioned(mean_loss.hessian_product, preconditioner)
            logs["extrap/preconditioned_sharpness"] = self._largest(product, mean_loss)
        return logs

    def _largest(self, product: Callable[[Tensor], Tensor], mean_loss: MeanLoss) -> float:
        try:
            return largest_eigenpair(product, mean_loss.point, tolerance=TOLERANCE, subspace=SUBSPACE).value
        except CurvatureError as error:
            # A diverged model has no curvature; its training may continue.
            logger.warning("no sharpness at step %d: %s", self.trainer.state.global_step, error)
            return math.nan
