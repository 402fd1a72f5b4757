"""Training arguments with an extrapolation scheme: the same names in Python, in YAML and on the command line."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_extrap.optim.config import Batch, Direction, DirectionDevice, DirectionDtype, ExtrapConfig, Scaling, Scope

from .argument_types import check_numbers, check_types
from .checkpoints.finding import Integrity
from .optimizers import base_optimizer

if TYPE_CHECKING:
    Base = TrainingArguments
else:
    Base = object


def described(default: Any, text: str) -> Any:
    """A dataclass field with a default and the text that `--help` prints for it."""
    return field(default=default, metadata={"help": text})


def _override(text: str) -> Any:
    return described(None, f"{text} Overrides the preset.")


@dataclass
class ExtrapArguments(Base):
    """Fields that a `TrainingArguments` gains: put this class before it among the bases of a new one.

    Each field's metadata holds its description, which `--help` prints. `extrap` names a preset of `hf_extrap.PRESETS`,
    and each `extrap_*` field but `extrap_virtual_workers` replaces one field of its `hf_extrap.ExtrapConfig`.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    extrap: str = described("none", "Preset of the extrapolation; 'none' is the stock Trainer.")
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
    extrap_end_step: int | None = _override("First step that no longer extrapolates.")
    extrap_precondition: bool | None = _override("Take the direction in the metric of a base optimizer like Adam.")
    extrap_direction_dtype: DirectionDtype | None = _override("Type in which directions are stored.")
    extrap_direction_device: DirectionDevice | None = _override("'cpu' keeps directions in the host's memory.")
    extrap_check_finite: bool | None = _override("Skip a step whose gradient is not finite.")
    extrap_swap: bool | None = _override("Point parameters to y instead of copying x; unset: only on the CPU.")
    extrap_seed: int | None = _override("Seed of noise and rounding; default: the training's seed.")
    max_skipped_steps: int | None = described(
        30,
        "Steps skipped in a row, for a gradient that is not finite, after which an extrapolated training ends with an "
        "error; a GradScaler skips about 16 before it has found its scale. None: never.",
    )
    extrap_virtual_workers: int = described(
        1,
        "Workers that each process simulates, one accumulation micro-batch each. Sets gradient_accumulation_steps, "
        "which must be 1 or the same number.",
    )
    batch_workers: bool = described(
        False,
        "Run all virtual workers in one pass. Needs one process, micro-batches of one shape and a model that vmap can "
        "run: no recurrent layers, no attention mask that transformers inspects. It is faster where a worker's pass "
        "leaves the device idle: on one CPU core an MLP at 16 samples ran 1.0 to 1.7 times as fast with 7 workers and "
        "1.4 to 3.8 with 32; at 200 samples, or on images of 32 x 32, it was no faster or slower. Dropout masks differ "
        "from those of workers one after another.",
    )
    lr_scaling: Literal["none", "linear", "sqrt"] = described(
        "none", "How learning_rate is scaled from base_batch_size to the batch of all workers."
    )
    base_batch_size: float | None = described(
        None,
        "Batch size that learning_rate was tuned at, for lr_scaling, in the units of the task: samples, or tokens for "
        "translation.",
    )
    warmup_epochs: float = described(0.0, "Warm-up in epochs, instead of warmup_steps.")
    lr_milestones: list[float] = field(
        default_factory=list,
        metadata={"help": "Shares of the training at which the learning rate is cut, instead of lr_scheduler_type."},
    )
    lr_milestone_factor: float = described(0.1, "What each milestone multiplies the learning rate by.")
    sgd_momentum: float = described(0.0, "Momentum of optim 'sgd'.")
    sgd_nesterov: bool = described(False, "Nesterov's momentum for optim 'sgd'.")
    base_optimizer: str | None = described(
        None,
        "Optimizer of torch.optim or pytorch_optimizer by name (nadam, lars, lamb), instead of optim; optim_args are "
        "its keyword arguments.",
    )
    local_steps: int = described(
        1,
        "H of post-local SGD: from local_sgd_start on every worker, virtual or a process, steps its own copy of the "
        "parameters with its own optimizer state, on its own gradient clipped to max_grad_norm, and the copies are "
        "averaged every H steps; 1: never. Evaluations see the mean of the copies and change nothing. A checkpoint "
        "averages too, and H steps are counted from it: a resume is exact, but a save_steps that is no multiple of H "
        "changes the run.",
    )
    local_sgd_start: float = described(
        0.5, "Share of the training after which local_steps begin. An extrapolation ends there, if not before."
    )
    carry_state: bool = described(
        False,
        "Truncated backpropagation through time: each worker's recurrent state is the initial state of its next batch.",
    )
    recalibrate_batch_norm: int = described(
        0,
        "How many of the last training micro-batches of each process give BatchNorm new running statistics, at x, "
        "before every evaluation and before the model is saved at the end; 0: none.",
    )
    sharpness_batches: int = described(
        0,
        "How many of the last training micro-batches of each process the largest Hessian eigenvalue is measured on, at "
        "every evaluation while training; 0: never. A measurement takes 8 products or more, each of the time of 2 "
        "gradients with one micro-batch, of 4 with several; Adam's metric takes as many again.",
    )
    checkpoint_integrity: Integrity = described(
        "strict",
        "What to do with a checkpoint whose files do not match its manifest of sizes and checksums: 'strict' refuses "
        "one that is given and passes over it if the newest is asked for, 'warn' logs the damage, 'off' does not look.",
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        # With base_optimizer they may be any Python literals.
        pairs = self.optim_args.split(",") if self.optim_args and self.base_optimizer is None else []
        if any(pair.count("=") != 1 for pair in pairs):
            raise ValueError(f"optim_args is {self.optim_args!r}; allowed: name=value, separated by commas.")
        # The others are fields of an ExtrapConfig, which checks them.
        check_types(self, ExtrapArguments, {f"extrap_{scheme.name}" for scheme in dataclasses.fields(ExtrapConfig)})
        workers, steps = self.extrap_virtual_workers, self.gradient_accumulation_steps
        if workers < 1:
            raise ValueError(f"extrap_virtual_workers is {workers}; allowed: a whole number >= 1.")
        if workers > 1 and steps not in (1, workers):
            raise ValueError(
                f"gradient_accumulation_steps is {steps} and extrap_virtual_workers is {workers}; allowed: the same "
                "number, or 1, since each micro-batch is a worker."
            )
        if workers > 1:
            self.gradient_accumulation_steps: int = workers
        super().__post_init__()
        if not isinstance(self.lr_scheduler_kwargs, dict | None):
            raise ValueError(f"lr_scheduler_kwargs is {self.lr_scheduler_kwargs!r:.80}; allowed: a mapping.")
        shares, both_warm = self.lr_milestones, bool(self.warmup_epochs and self.warmup_steps)
        conditions: dict[str, tuple[bool, str]] = {
            "max_skipped_steps": (
                self.max_skipped_steps is None or self.max_skipped_steps >= 1,
                "a whole number >= 1, or none",
            ),
            "sharpness_batches": (self.sharpness_batches >= 0, "a whole number >= 0"),
            "recalibrate_batch_norm": (self.recalibrate_batch_norm >= 0, "a whole number >= 0"),
            "local_steps": (self.local_steps >= 1, "a whole number >= 1"),
            "local_sgd_start": (0 <= self.local_sgd_start <= 1, "a share of the training, 0 to 1"),
            "lr_scaling": (self.lr_scaling in ("none", "linear", "sqrt"), "none, linear, sqrt"),
            "base_batch_size": (self.base_batch_size is None or self.base_batch_size > 0, "a number > 0"),
            "warmup_epochs": (self.warmup_epochs >= 0 and not both_warm, ">= 0, and 0 beside warmup_steps"),
            "lr_milestones": (
                all(0 < s < 1 for s in shares) and sorted(shares) == shares,
                "increasing shares in (0, 1)",
            ),
        }
        for name, (holds, allowed) in conditions.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}.")
        self.extrap_config()
        if self.lr_scaling != "none" and self.base_batch_size is None:
            raise ValueError(
                f"lr_scaling is {self.lr_scaling!r} and base_batch_size is missing; allowed: a number > 0, the batch "
                "size that learning_rate was tuned at."
            )
        if (self.sgd_momentum or self.sgd_nesterov) and self.optim != "sgd":
            raise ValueError(f"sgd_momentum and sgd_nesterov need optim 'sgd', and optim is {str(self.optim)!r}.")
        if self.base_optimizer is not None:
            if self.optim != self.default_optim:
                raise ValueError(
                    f"base_optimizer is {self.base_optimizer!r} and optim is {str(self.optim)!r}; allowed: one of them "
                    f"(optim at its default, {self.default_optim!r})."
                )
            base_optimizer(self, self.base_optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle, without the token: the stock Trainer saves it in every checkpoint."""
        return {**vars(self), "hub_token": None}

    def extrap_config(self) -> ExtrapConfig:
        """The scheme that `extrap` and the `extrap_*` fields name.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        names = [config_field.name for config_field in dataclasses.fields(ExtrapConfig)]
        values = {name: getattr(self, f"extrap_{name}") for name in names}
        given = {name: value for name, value in values.items() if value is not None}
        if isinstance(given.get("step_size"), str) and given["step_size"] != "auto":
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
