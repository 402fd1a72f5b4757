"""The largest curvature along training: measured at x at every evaluation, on the last training batches."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from hf_extrap.training.curvature.lanczos import largest_eigenpair
from hf_extrap.training.curvature.mean_loss import BatchNorm, CurvatureError, Differentiation, MeanLoss
from hf_extrap.training.curvature.preconditioner import adam_preconditioner, preconditioned

from .carried_state import State
from .reporting import EVALUATION, ReportingMixin

logger = logging.getLogger(__name__)

TOLERANCE = 0.05
"""Residual, as a share of the eigenvalue, at which a measurement along training is good enough."""
SUBSPACE = 6
"""Lanczos vectors of a measurement along training: most spectra have outliers, which a few products find."""

Sample = tuple[dict[str, Any], State | None]


class SharpnessMixin(ReportingMixin):
    """Logs `extrap/sharpness`, λ_max(H), and for Adam-like bases `extrap/preconditioned_sharpness`, λ_max(P^½ H P^½).

    H is the Hessian, at x, of the mean loss of the last `sharpness_batches` training micro-batches of every process,
    without dropout and with BatchNorm's statistics of each batch. Training goes on as if nothing had been measured.
    """

    def _start_sharpness(self) -> None:
        self._recent: deque[Sample] = deque(maxlen=self.args.sharpness_batches)
        self._measured_at = -1
        if self.args.sharpness_batches and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"sharpness_batches is {self.args.sharpness_batches} and the engine shards what it needs; allowed: one "
                "process or DDP, or sharpness_batches 0."
            )

    def _keep_for_sharpness(self, batches: Sequence[dict[str, Any]]) -> None:
        """Take a step's micro-batches, with the recurrent state that each of its workers begins with."""
        if self.args.sharpness_batches:
            self._recent.extend((dict(inputs), self._carried.of(f"worker {i}")) for i, inputs in enumerate(batches))

    def mean_loss(
        self,
        samples: Sequence[Sample],
        differentiation: Differentiation = "autograd",
        batch_norm: BatchNorm = "batch",
    ) -> MeanLoss:
        """The mean of the Trainer's loss over batches, each with its recurrent state, and over processes."""

        def loss(sample: Sample) -> Tensor:
            inputs, state = sample
            self._carried.put(EVALUATION, state)
            with self._probing():
                return cast(Tensor, self.compute_loss(self.model, self._prepare_inputs(dict(inputs))))

        return MeanLoss(
            self.model,
            loss,
            samples,
            differentiation=differentiation,
            batch_norm=batch_norm,
            average=lambda tensor: self.accelerator.reduce(tensor, "mean"),
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The stock evaluation; while training, a row with the sharpness is logged before it."""
        if self.is_in_train and self._recent and self._measured_at != self.state.global_step:
            self._measured_at = self.state.global_step
            self.log(self._sharpness_logs())
        return super().evaluate(*args, **kwargs)

    def samples(self, loader: Iterable[dict[str, Any]], count: int, streams: int = 1) -> list[Sample]:
        """The first batches of a loader, each with the recurrent state that the model has when it comes to it.

        Args:
            loader: gives the batches.
            count: how many at most.
            streams: batches take turns among this many workers, each with a state of its own.
        """
        samples: list[Sample] = []
        states: dict[int, State | None] = {}
        was_training = self.model.training
        self.model.eval()
        for index, inputs in enumerate(islice(loader, count)):
            worker = index % streams
            samples.append((inputs, states.get(worker)))
            if self.args.carry_state:
                self._carried.put(EVALUATION, states.get(worker))
                with torch.no_grad():
                    self.compute_loss(self.model, self._prepare_inputs(dict(inputs)))
                states[worker] = self._carried.of(EVALUATION)
        self._carried.put(EVALUATION, None)
        self.model.train(was_training)
        return samples

    def preconditioner(self, mean_loss: MeanLoss) -> Tensor | None:
        """P of the optimizer, see `adam_preconditioner`."""
        optimizer = self.extrapolated or self.optimizer
        return None if optimizer is None else adam_preconditioner(optimizer, mean_loss.parameters)

    def _sharpness_logs(self) -> dict[str, float]:
        mean_loss = self.mean_loss(self._recent)
        logs = {"extrap/sharpness": self._measured(mean_loss.hessian_product, mean_loss)}
        if (preconditioner := self.preconditioner(mean_loss)) is not None:
            product = preconditioned(mean_loss.hessian_product, preconditioner)
            logs["extrap/preconditioned_sharpness"] = self._measured(product, mean_loss)
        self._carried.put(EVALUATION, None)
        return logs

    def _measured(self, product: Callable[[Tensor], Tensor], mean_loss: MeanLoss) -> float:
        try:
            return largest_eigenpair(product, mean_loss.point, tolerance=TOLERANCE, subspace=SUBSPACE).value
        except CurvatureError as error:
            # Training goes on where it can: a run that has diverged has no curvature.
            logger.warning("no sharpness at step %d: %s", self.state.global_step, error)
            return math.nan
