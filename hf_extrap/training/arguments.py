"""Training arguments with an extrapolation scheme: the same names in Python, in YAML and on the command line."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_extrap.optim.config import Batch, Direction, DirectionDevice, DirectionDtype, ExtrapConfig, Scaling, Scope

from .optimizers import base_optimizer

if TYPE_CHECKING:
    Base = TrainingArguments
else:
    Base = object


def _override(help_text: str) -> Any:
    return field(default=None, metadata={"help": f"{help_text} Overrides the preset."})


@dataclass
class ExtrapArguments(Base):
    """Fields that a `TrainingArguments` gains: put this class before it among the bases of a new one.

    Parameters that control the extrapolation:
        extrap: the preset, see `hf_extrap.PRESETS`.
        extrap_<field>: replaces one field of the preset, see `hf_extrap.ExtrapConfig`.
        extrap_virtual_workers: how many workers each process plays, one accumulation micro-batch each; it sets
            gradient_accumulation_steps, which must otherwise agree.
        batch_workers: all virtual workers in one pass instead of one after another, in one process. Micro-batches need
            one shape, the model a batching rule for all that it does: no recurrent layers, no attention mask where
            transformers looks into it. It pays where one worker's pass leaves the device idle, for small micro-batches
            of small models: on one CPU core an MLP at 16 samples ran 1.0 to 1.7 times as fast with 7 workers and 1.4 to
            3.8 with 32, a ResNet-8 on digits with 8 about 1.9; at 200 samples, or on pictures of 32 × 32, it was no
            faster or slower. Dropout masks are other ones than the loop's.

    Parameters that control the learning rate:
        lr_scaling, base_batch_size: learning_rate was tuned at base_batch_size (in the units of the task: samples, or
            tokens for translation) and is scaled to the batch of all workers.
        warmup_epochs: warm-up in epochs, instead of warmup_steps.
        lr_milestones, lr_milestone_factor: step decay at shares of the training, instead of lr_scheduler_type.
        sgd_momentum, sgd_nesterov: of `optim: sgd`.
        base_optimizer: a name of torch.optim or pytorch_optimizer (nadam, lars, lamb), instead of optim; optim_args
            are its keyword arguments.

    Parameters that control post-local SGD:
        local_steps: H. From `local_sgd_start` on every worker, virtual or a process, steps its own copy of x with its
            own optimizer state, its own gradient clipped to max_grad_norm and the current learning rate, and the copies
            are averaged every H steps; 1 for never. Evaluations see the mean of the copies and leave them as they are.
            A checkpoint between averagings is an averaging too, and H steps are counted from it: it resumes bit for
            bit, and a save_steps that is no multiple of H changes the run.
        local_sgd_start: the share of the training after which it begins. An extrapolation ends there, if not before.

    Parameters that control recurrent models:
        carry_state: truncated backpropagation through time, each worker's recurrent state goes on in its next batch.

    Parameters that control models with BatchNorm:
        recalibrate_batch_norm: how many of the last training micro-batches of each process give new running statistics,
            at x, before every evaluation and before the model is saved at the end; 0 for none.

    Parameters that control what is measured:
        sharpness_batches: how many of the last training micro-batches of each process the largest Hessian eigenvalue is
            measured on, at every evaluation while training; 0 for never. A measurement takes 8 products or more, each
            of the time of 2 gradients with one micro-batch, of 4 with several; Adam's metric takes as many again.
    """

    extrap: str = field(default="none", metadata={"help": "Preset of the extrapolation; 'none' is the stock Trainer."})
    extrap_direction: Direction | None = _override("The direction d.")
    extrap_scope: Scope | None = _override("Whether each worker has a direction of its own.")
    extrap_scaling: Scaling | None = _override("How the direction is scaled.")
    extrap_step_size: str | None = _override("The step size: a number, or 'auto' to follow the measured curvature.")
    extrap_step_ratio: float | None = _override("The step size as a share of the learning rate.")
    extrap_curvature_share: float | None = _override("c of the step size c / curvature, for 'auto'.")
    extrap_ascent: bool | None = _override("Go up instead of down.")
    extrap_batch: Batch | None = _override("Samples of a fresh direction.")
    extrap_batch_fraction: float | None = _override("Share of the local batch that a fresh direction uses.")
    extrap_anneal: bool | None = _override("Let the step size follow the learning-rate schedule.")
    extrap_probe_every: int | None = _override("Steps from one measurement of the curvature to the next.")
    extrap_max_displacement: float | None = _override("Cap of the move as a share of the last step's length.")
    extrap_start_step: int | None = _override("First step that extrapolates.")
    extrap_end_step: int | None = _override("First step that no longer does.")
    extrap_precondition: bool | None = _override("Take the direction in the metric of a base optimizer like Adam.")
    extrap_direction_dtype: DirectionDtype | None = _override("Type in which directions are stored.")
    extrap_direction_device: DirectionDevice | None = _override("'cpu' keeps directions in the host's memory.")
    extrap_check_finite: bool | None = _override("Give up a step whose gradient is not finite.")
    extrap_swap: bool | None = _override("Point parameters to y instead of copying x; unset: on the CPU alone.")
    extrap_seed: int | None = _override("Seed of noise and rounding; the training's seed unless given.")
    extrap_virtual_workers: int = field(
        default=1, metadata={"help": "Workers that each process plays, one accumulation micro-batch each."}
    )
    batch_workers: bool = field(
        default=False,
        metadata={
            "help": "Run all virtual workers in one pass, which pays for small models and micro-batches that leave "
            "the device idle; equal shapes, no recurrent layers."
        },
    )
    lr_scaling: Literal["none", "linear", "sqrt"] = field(
        default="none", metadata={"help": "How the learning rate grows with the batch."}
    )
    base_batch_size: float | None = field(
        default=None, metadata={"help": "Batch size that learning_rate was tuned at, for lr_scaling."}
    )
    warmup_epochs: float = field(default=0.0, metadata={"help": "Warm-up in epochs, instead of warmup_steps."})
    lr_milestones: list[float] = field(
        default_factory=list, metadata={"help": "Shares of the training at which the learning rate is cut."}
    )
    lr_milestone_factor: float = field(default=0.1, metadata={"help": "What each milestone multiplies the rate by."})
    sgd_momentum: float = field(default=0.0, metadata={"help": "Momentum of optim 'sgd'."})
    sgd_nesterov: bool = field(default=False, metadata={"help": "Nesterov's momentum for optim 'sgd'."})
    base_optimizer: str | None = field(
        default=None,
        metadata={"help": "Optimizer of torch or pytorch_optimizer (nadam, lars, lamb), instead of optim."},
    )
    local_steps: int = field(
        default=1, metadata={"help": "Steps of each worker by itself from one averaging to the next; 1: none."}
    )
    local_sgd_start: float = field(
        default=0.5, metadata={"help": "Share of the training after which workers step by themselves, for local_steps."}
    )
    carry_state: bool = field(
        default=False, metadata={"help": "Hand the recurrent state of a batch on to the worker's next batch."}
    )
    recalibrate_batch_norm: int = field(
        default=0,
        metadata={"help": "Last micro-batches that give BatchNorm new statistics at x for evaluation; 0: none."},
    )
    sharpness_batches: int = field(
        default=0, metadata={"help": "Last micro-batches on which each evaluation measures the sharpness; 0: never."}
    )

    def __post_init__(self) -> None:
        if self.extrap_virtual_workers < 1:
            raise ValueError(f"extrap_virtual_workers is {self.extrap_virtual_workers}; allowed: a whole number >= 1.")
        if self.extrap_virtual_workers > 1:
            if self.gradient_accumulation_steps not in (1, self.extrap_virtual_workers):
                raise ValueError(
                    f"gradient_accumulation_steps is {self.gradient_accumulation_steps} and "
                    f"extrap_virtual_workers is {self.extrap_virtual_workers}; allowed: the same number, or 1, since "
                    "each micro-batch is a worker."
                )
            self.gradient_accumulation_steps: int = self.extrap_virtual_workers
        super().__post_init__()
        if self.sharpness_batches < 0:
            raise ValueError(f"sharpness_batches is {self.sharpness_batches}; allowed: a whole number >= 0.")
        if self.recalibrate_batch_norm < 0:
            raise ValueError(f"recalibrate_batch_norm is {self.recalibrate_batch_norm}; allowed: a whole number >= 0.")
        if self.local_steps < 1:
            raise ValueError(f"local_steps is {self.local_steps}; allowed: a whole number >= 1.")
        if not 0 <= self.local_sgd_start <= 1:
            raise ValueError(f"local_sgd_start is {self.local_sgd_start}; allowed: a share of the training, 0 to 1.")
        self.extrap_config()
        self._check_learning_rate()
        if self.base_optimizer is not None:
            if self.optim != self.default_optim:
                raise ValueError(
                    f"base_optimizer is {self.base_optimizer!r} and optim is {str(self.optim)!r}; allowed: one of them "
                    f"(optim at its default, {self.default_optim!r})."
                )
            base_optimizer(self, self.base_optimizer)

    def _check_learning_rate(self) -> None:
        if self.lr_scaling not in ("none", "linear", "sqrt"):
            raise ValueError(f"lr_scaling is {self.lr_scaling!r}; allowed: none, linear, sqrt.")
        if self.base_batch_size is not None and self.base_batch_size <= 0:
            raise ValueError(f"base_batch_size is {self.base_batch_size}; allowed: a number > 0.")
        if self.lr_scaling != "none" and self.base_batch_size is None:
            raise ValueError(
                f"lr_scaling is {self.lr_scaling!r} and base_batch_size is missing, the batch size that learning_rate "
                "was tuned at."
            )
        if self.warmup_epochs < 0 or (self.warmup_epochs and self.warmup_steps):
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}; allowed: >= 0, and 0 beside warmup_steps.")
        inside = all(0 < share < 1 for share in self.lr_milestones)
        if not inside or sorted(self.lr_milestones) != self.lr_milestones:
            raise ValueError(f"lr_milestones is {self.lr_milestones}; allowed: increasing shares in (0, 1).")
        if (self.sgd_momentum or self.sgd_nesterov) and self.optim != "sgd":
            raise ValueError(f"sgd_momentum and sgd_nesterov need optim 'sgd', and optim is {str(self.optim)!r}.")

    def extrap_config(self) -> ExtrapConfig:
        """The scheme that `extrap` and the `extrap_*` fields name.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        given = {
            config_field.name: getattr(self, f"extrap_{config_field.name}")
            for config_field in dataclasses.fields(ExtrapConfig)
            if getattr(self, f"extrap_{config_field.name}") is not None
        }
        if "step_size" in given and given["step_size"] != "auto":
            try:
                given["step_size"] = float(given["step_size"])
            except ValueError:
                raise ValueError(f"extrap_step_size is {given['step_size']!r}; allowed: a number, or 'auto'.") from None
        given.setdefault("seed", self.seed)
        return ExtrapConfig.preset(self.extrap, **given)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of the warm-up; `warmup_epochs` is its share of all epochs."""
        if self.warmup_epochs:
            return math.ceil(num_training_steps * min(1.0, self.warmup_epochs / self.num_train_epochs))
        return super().get_warmup_steps(num_training_steps)


@dataclass
class ExtrapTrainingArguments(ExtrapArguments, TrainingArguments):
    """`TrainingArguments` and the fields of `ExtrapArguments`."""


@dataclass
class ExtrapSeq2SeqTrainingArguments(ExtrapArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and the fields of `ExtrapArguments`."""
