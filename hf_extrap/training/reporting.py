"""What the Trainer logs about the extrapolation, and the losses at x and at y side by side."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hf_extrap.optim.extrapolated import Extrapolated

from .base import MixinBase
from .carried_state import State
from .diagnostics import GradientNoiseScale
from .model_card import add_extrapolation

logger = logging.getLogger(__name__)

EVALUATION = "evaluation"
"""The slot of the recurrent states of evaluations."""

NO_EFFECT = 0.01
"""Share of the optimizer's step below which a displacement is not worth its name."""

SHARED = (
    "displacement_norm",
    "step_length",
    "step_size",
    "direction_cosine",
    "gradient_square",
    "pass_square",
    "passes",
)


class ReportingMixin(MixinBase):
    """Logs on every logging step, and at every evaluation while training."""

    batch_size_unit: float

    def _start_reporting(self) -> None:
        self._noise_scale = GradientNoiseScale()
        self._last_pass: tuple[dict[str, Any], State | None] | None = None
        self._losses_side_by_side: dict[str, float] = {}
        self._is_probing = False
        self._warned_of_no_effect = False

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Passes inside leave the recurrent states as they are."""
        self._is_probing = True
        try:
            yield
        finally:
            self._is_probing = False

    def _logs_after_this_step(self) -> bool:
        step = self.state.global_step + 1
        if self.args.logging_strategy == "steps":
            return step % max(1, self.state.logging_steps) == 0 or (step == 1 and self.args.logging_first_step)
        return self.args.logging_strategy == "epoch"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock log, with what the extrapolation did; a collective call while training."""
        if "loss" in logs and self.extrapolated is not None:
            logs.update(self._extrapolation_logs(self.extrapolated, logs["loss"]))
        if self._losses_side_by_side and any(key.endswith("_loss") for key in logs):
            prefix = next(key for key in logs if key.endswith("_loss")).removesuffix("_loss")
            logs.update({f"{prefix}_extrap/{name}": value for name, value in self._losses_side_by_side.items()})
            self._losses_side_by_side = {}
        super().log(logs, start_time)

    def _extrapolation_logs(self, optimizer: Extrapolated, loss: float) -> dict[str, float]:
        seen = optimizer.statistics
        local = torch.tensor([seen.get(name, 0.0) for name in SHARED], dtype=torch.float64)
        means = self.accelerator.reduce(local.to(torch.float32).to(self.args.device), "mean").tolist()
        mean = dict(zip(SHARED, means, strict=True))
        logs = {f"extrap/{name}": mean[name] for name in ("displacement_norm", "step_size")}
        if mean["step_length"] > 0:
            logs["extrap/displacement_share"] = mean["displacement_norm"] / mean["step_length"]
            self._warn_of_no_effect(logs["extrap/displacement_share"])
        if "direction_cosine" in seen:
            logs["extrap/direction_cosine"] = mean["direction_cosine"]
        logs["extrap/loss_at_y"] = loss
        logs["extrap/skipped_steps"] = optimizer.skipped_steps
        workers = round(mean["passes"]) * self.accelerator.num_processes
        if workers >= 2 and math.isfinite(mean["pass_square"]):
            small = self.args.train_batch_size * self.batch_size_unit
            self._noise_scale.update(mean["pass_square"], mean["gradient_square"], small, workers * small)
            logs["extrap/gradient_noise_scale"] = self._noise_scale.value
        return logs

    def _warn_of_no_effect(self, share: float) -> None:
        """Say once that y is as good as x, which happens to raw gradients beside Adam's much longer steps."""
        if 0 < share < NO_EFFECT and not self._warned_of_no_effect:
            self._warned_of_no_effect = True
            # Every process sees the same mean.
            log = logger.warning if self.is_world_process_zero() else logger.debug
            log(
                "the extrapolation moves by %.1e of a step of the optimizer, which changes next to nothing: give a "
                "larger extrap_step_ratio or extrap_step_size, until extrap/displacement_share is 0.05 or more",
                share,
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The stock card, as `push_to_hub` writes it, with the scheme and the base optimizer's real name."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and (optimizer := self.extrapolated) is not None:
            card = Path(str(self.args.output_dir)) / "README.md"
            add_extrapolation(card, self.args.extrap, optimizer.config, optimizer)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The stock evaluation, at x; while training, the last batch's loss at x and at y is logged beside it."""
        self._carried.put(EVALUATION, None)
        if self.is_in_train and self._last_pass is not None and self.extrapolated is not None:
            self._losses_side_by_side = self._losses_at_x_and_y(self.extrapolated, *self._last_pass)
        return super().evaluate(*args, **kwargs)

    def _losses_at_x_and_y(self, optimizer: Extrapolated, inputs: dict[str, Any], state: Any) -> dict[str, float]:
        """The loss of the last batch, without dropout, at x and at the y that the scheme would look from next."""
        # DeepSpeed passes backward through its own wrapper alone.
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        was_training = model.training

        def loss() -> Tensor:
            self._carried.put(EVALUATION, state)
            with self._probing(), self.compute_loss_context_manager():
                return cast(Tensor, self.compute_loss(model, self._prepare_inputs(dict(inputs))))

        model.eval()
        try:
            with torch.no_grad():
                at_x = loss()
            if optimizer.wants_probe:
                with optimizer.probing(worker=0) as backward:
                    self._pass_back(loss(), backward)
            with optimizer.extrapolating(worker=0), torch.no_grad():
                at_y = loss()
        finally:
            model.train(was_training)
            self._carried.put(EVALUATION, None)
        means = self.accelerator.reduce(torch.stack([at_x.detach().float(), at_y.detach().float()]), "mean").tolist()
        return {"loss_at_x": means[0], "loss_at_y": means[1]}
