"""What the Trainer logs about the extrapolation: its moves, the gradient noise scale, the losses at x and at y."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.training.checkpoints.rank_state import RankState

from .base import Component, Inputs
from .carried_state import State

logger = logging.getLogger(__name__)

NO_EFFECT = 0.01
"""Displacement, as a share of the optimizer's step, below which extrapolation changes next to nothing."""

AVERAGED = tuple("displacement_norm step_length step_size direction_cosine gradient_square pass_square passes".split())
"""Statistics that are averaged over processes."""


@dataclass
class GradientNoiseScale:
    """The batch size, in the units of `small_batch`, up to which a larger batch still pays: B = tr(Σ) / ‖G‖².

    Gradients at two batch sizes give unbiased estimates of both parts; each is smoothed over the measurements, since
    their quotient is biased, with the weight `smoothing` of the past.

    Source: McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1.
    """

    smoothing: float = 0.9
    _noise: float = 0.0
    _signal: float = 0.0
    _weight: float = 0.0

    def update(self, small_square: float, large_square: float, small_batch: float, large_batch: float) -> None:
        """Take the mean of ‖g‖² over workers of `small_batch` samples, and ‖ḡ‖² of their average over `large_batch`."""
        signal = (large_batch * large_square - small_batch * small_square) / (large_batch - small_batch)
        noise = (small_square - large_square) / (1 / small_batch - 1 / large_batch)
        self._signal = self.smoothing * self._signal + (1 - self.smoothing) * signal
        self._noise = self.smoothing * self._noise + (1 - self.smoothing) * noise
        self._weight = self.smoothing * self._weight + (1 - self.smoothing)

    @property
    def value(self) -> float:
        """B; NaN before the first measurement, infinite where the estimate of ‖G‖² is not positive."""
        if not self._weight:
            return math.nan
        return self._noise / self._signal if self._signal > 0 else math.inf

    def state(self) -> dict[str, float]:
        """The moving averages, for a checkpoint."""
        return {"noise": self._noise, "signal": self._signal, "weight": self._weight}

    def load_state(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        self._noise, self._signal, self._weight = state["noise"], state["signal"], state["weight"]


class Diagnostics(Component):
    """Adds to every logged training row, and to every evaluation while training."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._noise_scale = GradientNoiseScale()
        self._last_batch: tuple[Inputs, State | None] | None = None
        self._losses_at_x_and_y: dict[str, float] = {}
        self._warned = False

    def before_step(self, batches: Sequence[Inputs]) -> None:
        """Keep the last micro-batch, and collect statistics if this step is logged."""
        if batches:
            self._last_batch = batches[-1], self.trainer.carried.of(f"worker {len(batches) - 1}")
        if (optimizer := self.trainer.extrapolated) is not None:
            # Statistics are those of gradients taken at one point.
            optimizer.collect_statistics = self._logs_after_this_step() and not self.trainer.local_sgd.is_local

    def _logs_after_this_step(self) -> bool:
        args, state = self.trainer.args, self.trainer.state
        step = state.global_step + 1
        if args.logging_strategy == "steps":
            return step % max(1, state.logging_steps) == 0 or (step == 1 and args.logging_first_step)
        return args.logging_strategy == "epoch"

    def before_evaluate(self) -> None:
        """While training, take the losses of the last micro-batch at x and at y."""
        optimizer = self.trainer.extrapolated
        if self.trainer.is_in_train and self._last_batch is not None and optimizer is not None:
            self._losses_at_x_and_y = self._measured(optimizer, *self._last_batch)

    def logs(self, row: dict[str, float]) -> dict[str, float]:
        """The moves and the noise scale beside a training loss, the losses at x and at y beside an evaluation's."""
        logs: dict[str, float] = {}
        if "loss" in row and self.trainer.extrapolated is not None:
            logs = self._moves(self.trainer.extrapolated, row["loss"])
        prefix = next((key for key in row if key.endswith("_loss")), "").removesuffix("_loss")
        if prefix and self._losses_at_x_and_y:
            logs.update({f"{prefix}_extrap/{name}": value for name, value in self._losses_at_x_and_y.items()})
            self._losses_at_x_and_y = {}
        return logs

    def _moves(self, optimizer: Extrapolated, loss: float) -> dict[str, float]:
        trainer, statistics = self.trainer, optimizer.statistics
        local = torch.tensor([statistics.get(name, 0.0) for name in AVERAGED], dtype=torch.float64)
        means = trainer.accelerator.reduce(local.to(torch.float32).to(trainer.args.device), "mean").tolist()
        mean = dict(zip(AVERAGED, means, strict=True))
        logs = {f"extrap/{name}": mean[name] for name in ("displacement_norm", "step_size")}
        if mean["step_length"] > 0:
            logs["extrap/displacement_share"] = mean["displacement_norm"] / mean["step_length"]
            self._warn_of_no_effect(logs["extrap/displacement_share"])
        if "direction_cosine" in statistics:
            logs["extrap/direction_cosine"] = mean["direction_cosine"]
        logs["extrap/loss_at_y"] = loss
        logs["extrap/skipped_steps"] = optimizer.skipped_steps
        workers = round(mean["passes"]) * trainer.accelerator.num_processes
        if workers >= 2 and math.isfinite(mean["pass_square"]):
            # Not that of the arguments, which `auto_find_batch_size` may have decreased.
            small = (trainer.state.train_batch_size or trainer.args.train_batch_size) * trainer.batch_size_unit
            self._noise_scale.update(mean["pass_square"], mean["gradient_square"], small, workers * small)
            logs["extrap/gradient_noise_scale"] = self._noise_scale.value
            logs["extrap/batch_size"] = workers * small
        return logs

    def _warn_of_no_effect(self, share: float) -> None:
        """Warn once that y is nearly x, as with raw gradients beside Adam's much longer steps."""
        if 0 < share < NO_EFFECT and not self._warned:
            self._warned = True
            # Every process sees the same mean.
            log = logger.warning if self.trainer.is_world_process_zero() else logger.debug
            log(
                "the extrapolation moves by %.1e of a step of the optimizer, which changes next to nothing: give a "
                "larger extrap_step_ratio or extrap_step_size, until extrap/displacement_share is 0.05 or more",
                share,
            )

    def _measured(self, optimizer: Extrapolated, inputs: Inputs, state: State | None) -> dict[str, float]:
        """The loss of a batch, without dropout, at x and at the y of the next step."""
        trainer = self.trainer
        # DeepSpeed passes backward through its own wrapper only.
        model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
        was_training, loss = model.training, partial(trainer.loss_of, inputs, state, model)
        model.eval()
        try:
            with torch.no_grad():
                at_x = loss()
            if optimizer.wants_probe:
                with optimizer.probing(worker=0) as backward:
                    trainer.pass_back(loss(), backward)
            with optimizer.extrapolating(worker=0), torch.no_grad():
                at_y = loss()
        finally:
            model.train(was_training)
        losses = torch.stack([at_x.detach().float(), at_y.detach().float()])
        means = trainer.accelerator.reduce(losses, "mean").tolist()
        return dict(zip(("loss_at_x", "loss_at_y"), means, strict=True))

    def state(self) -> RankState:
        return RankState(facts={"noise_scale": self._noise_scale.state()})

    def load(self, state: RankState) -> None:
        if "noise_scale" in state.facts:
            self._noise_scale.load_state(state.facts["noise_scale"])
