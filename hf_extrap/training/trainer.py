"""The Trainer with extrapolation: wiring of Extrapolated into transformers' loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.probing import pass_at_y
from hf_extrap.optim.random import generator_for

from .arguments import ExtrapArguments, ExtrapTrainingArguments
from .callbacks import SkippedStepsLimit
from .checkpoints.finding import check_whole, find_checkpoint
from .checkpoints.matching import check_checkpoint_matches
from .checkpoints.rank_state import load_rank_state, save_rank_state
from .checkpoints.saving import CheckpointWriter
from .components.base import Component, Inputs
from .components.batch_norm import BatchNormStatistics
from .components.batched_workers import WorkersInOnePass
from .components.carried_state import CarriedState, State
from .components.diagnostics import Diagnostics
from .components.directions import Directions
from .components.fresh_direction import FreshDirection
from .components.local_sgd import LocalSteps
from .components.running_loss import RunningLoss
from .components.sharpness import Sharpness
from .loss_scaling import uses_num_items
from .optimizers import class_and_arguments, scale_learning_rate, scheme_of, step_decay, wrapped
from .requirements import check_deepspeed_runs, check_requirements
from .uploads import Uploads

if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


class ExtrapTrainerMixin(TrainerBase):
    """Extrapolation for any Trainer: `class MyTrainer(ExtrapTrainerMixin, SomeTrainer)`.

    Its arguments need the fields of `ExtrapArguments`. Gradients are taken at y; everything else in the loop
    (clipping, evaluation, saving, uploading, callbacks) sees the parameters x.

    Attributes:
        extrap_config: the extrapolation scheme of the arguments.
        batch_size_unit: how many units, such as tokens, one item of the dataset counts for `lr_scaling` and the
            gradient noise scale.
        augment: changes a training micro-batch on its device, at random by the generator only.
        carried: the recurrent states of `carry_state`.
        local_sgd: the local steps of `local_steps`.
        sharpness: measures the largest curvature.
        resumed_from: the checkpoint that `train` has resumed from.
        uploads: the model card, and what else goes to the Hub beside the weights.
    """

    args: ExtrapTrainingArguments
    model: nn.Module
    resumed_from: Path | None = None
    _client_optimizer: Extrapolated | None = None
    _connected_to: nn.Module | None = None
    _tag_names = ["hf_extrap"]
    _paper = "arxiv:2006.05720"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, ExtrapArguments):
            raise TypeError(
                f"args is a {type(self.args).__name__}, which lacks the extrap fields; allowed: "
                "ExtrapTrainingArguments, or a class with ExtrapArguments before its own TrainingArguments as bases."
            )
        self.batch_size_unit = 1.0
        self.augment: Callable[[Inputs, torch.Generator], Inputs] | None = None
        self._uses_num_items: bool = self.model_accepts_loss_kwargs
        self._configure()
        self._micro_batch = 0
        self._writer = CheckpointWriter(self)
        self.uploads = Uploads(self)
        self.local_sgd = LocalSteps(self)
        self.carried = CarriedState(self)
        self.sharpness = Sharpness(self)
        self._batch_norm = BatchNormStatistics(self)
        self._fresh = FreshDirection(self)
        self._one_pass = WorkersInOnePass(self, self._fresh)
        self._running_loss = RunningLoss(self)
        # In the order in which an evaluation needs them.
        first: list[Component] = [self.local_sgd, self.carried, self._batch_norm, self.sharpness]
        self._components = [*first, self._fresh, self._running_loss, Diagnostics(self), Directions(self)]
        self.add_callback(SkippedStepsLimit(self))

    def _configure(self) -> None:
        """Take the scheme from the arguments, at first and for each trial of `hyperparameter_search`."""
        self.extrap_config = scheme_of(self.args, self.optimizer)
        check_requirements(self)
        # A worker's gradient is that of its own mean loss, so that its scale is known.
        self.model_accepts_loss_kwargs = self._uses_num_items and self.extrap_config.direction == "none"
        self._loss_kwargs_checked = not self.model_accepts_loss_kwargs

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if self.hp_search_backend is not None and trial is not None:
            self._configure()

    @property
    def extrapolated(self) -> Extrapolated | None:
        """The wrapper, wherever accelerate has put it; None before `create_optimizer`."""
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, Extrapolated):
            return optimizer
        # DeepSpeed has an optimizer of its own in that place, which calls ours.
        return self._client_optimizer if self.is_deepspeed_enabled else None

    @property
    def has_engine(self) -> bool:
        """Whether DeepSpeed or FSDP holds the parameters."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def prepare(self, inputs: Inputs) -> Inputs:
        """A copy of a micro-batch, on its device."""
        return cast(Inputs, self._prepare_inputs(dict(inputs)))

    def loss_of(self, inputs: Inputs, state: State | None = None, model: nn.Module | None = None) -> Tensor:
        """The loss of a micro-batch by a pass of the model, by default the unwrapped one, that changes no state.

        In evaluation mode the recurrent state to begin with is `state`.
        """
        with self.carried.starting_from(state), self.compute_loss_context_manager():
            return cast(Tensor, self.compute_loss(self.model if model is None else model, self.prepare(inputs)))

    def pass_back(self, loss: Tensor, backward: Callable[[Tensor], None]) -> None:
        """Pass a loss backward inside `Extrapolated.probing`, which yields `backward`."""
        if self.is_deepspeed_enabled:
            # It divides by the accumulation steps of its configuration.
            backward(loss * self.args.gradient_accumulation_steps)
        else:
            self.accelerator.backward(loss)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The base optimizer, its learning rate scaled to the batch, inside `Extrapolated`."""
        ours, args = self.optimizer is None, self.args
        optimizer = super().create_optimizer(model)
        if ours:
            batch_size = self.get_total_train_batch_size(args) * self.batch_size_unit
            scale_learning_rate(optimizer, args.lr_scaling, batch_size, args.base_batch_size)
        if not isinstance(optimizer, AcceleratedOptimizer) and self.extrapolated in (None, optimizer):
            self.optimizer = optimizer = wrapped(optimizer, self.extrap_config, args, self.accelerator.scaler)
            self._client_optimizer = self.extrapolated
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """The class that `base_optimizer` names, or the stock choice, with momentum for `optim: sgd`."""
        return class_and_arguments(args, Trainer.get_optimizer_cls_and_kwargs, model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The stock scheduler, or step decay if `lr_milestones` are given."""
        if self.lr_scheduler is None and self.args.lr_milestones:
            warmup = self.args.get_warmup_steps(num_training_steps)
            rate = step_decay(num_training_steps, warmup, self.args.lr_milestones, self.args.lr_milestone_factor)
            self.lr_scheduler = LambdaLR(optimizer or cast(torch.optim.Optimizer, self.optimizer), rate)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The stock training, from a verified checkpoint, and also after an evaluation."""
        if self.model is not None:
            # Marked by an evaluation: accelerate would not wrap the model for DDP, and each process would train alone.
            vars(self.model).pop("_is_accelerate_prepared", None)
        output_dir, integrity = Path(str(self.args.output_dir)), self.args.checkpoint_integrity
        self.resumed_from = find_checkpoint(resume_from_checkpoint, output_dir, integrity)
        return super().train(str(self.resumed_from) if self.resumed_from else None, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._running_loss.start()
        model, dataloader = super()._prepare_for_training(*args, **kwargs)
        self._connect(model)
        return model, dataloader

    def _connect(self, model: nn.Module) -> None:
        """Connect the wrapper to its engine, once, before its state is loaded."""
        if self.is_deepspeed_enabled:
            check_deepspeed_runs(model)
        if self.has_engine and self._connected_to is not model and (optimizer := self.extrapolated) is not None:
            optimizer.connect(model)
            self._connected_to = model

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._running_loss.restore()
        if self.state.global_step >= self.state.max_steps:
            # A checkpoint of the last step, inside an epoch: the stock loop would train one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._running_loss.restore()
        self.local_sgd.stop()
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def get_batch_samples(self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device) -> Any:
        """The step's micro-batches; what a step must know before its first pass is set here."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and not self._loss_kwargs_checked and num_items is not None:
            self._loss_kwargs_checked, model = True, self.accelerator.unwrap_model(self.model)
            with self.compute_loss_context_manager():
                uses = uses_num_items(model, super().compute_loss, self.prepare(batches[0]))
            self.model_accepts_loss_kwargs = self._uses_num_items = uses
            num_items = num_items if uses else None
        if self.augment is not None:
            batches = [self._augmented(inputs, index) for index, inputs in enumerate(batches)]
        self._micro_batch = 0
        for component in self._components:
            component.before_step(batches)
        optimizer = self.extrapolated
        if optimizer is not None and optimizer.virtual_workers > 1 and batches:
            optimizer.loss_scale = 1 / len(batches)
        return batches, None if self.local_sgd.is_local else num_items

    def _augmented(self, inputs: Inputs, micro_batch: int) -> Inputs:
        """A micro-batch, augmented once for all its passes, equally for a virtual worker and for a process."""
        assert self.augment is not None
        worker = micro_batch * self.args.world_size + self.args.process_index
        key = ("augmentation", self.args.seed, self.state.global_step, worker)
        return self.augment(self.prepare(inputs), generator_for(self.args.device, *key))

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> Tensor:
        """One worker's pass: a fresh direction if the scheme has one, x → y, forward and backward at y, y → x."""
        optimizer, micro_batch = self.extrapolated, self._micro_batch
        if optimizer is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self.carried.worker = micro_batch
        worker = micro_batch if optimizer.virtual_workers > 1 else 0
        moves = self.extrap_config.direction != "none" or optimizer.collect_statistics or self.has_engine
        if self.args.batch_workers:
            loss = self._one_pass.training_step(model, optimizer, micro_batch, num_items_in_batch)
        else:
            with self.local_sgd.step(model, micro_batch), self._batch_norm.of_first_worker(model, worker):
                if moves and optimizer.wants_probe:
                    self._fresh.probe(model, optimizer, worker)
                with pass_at_y(optimizer, worker) if moves else nullcontext():
                    loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batch += 1
        # DeepSpeed has taken the step by now.
        is_whole = self._micro_batch == len(self._fresh.batches) and not self.is_deepspeed_enabled
        if is_whole and optimizer.collect_statistics:
            optimizer.observe()
        return self._running_loss.summand(loss, len(self._fresh.batches))

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stock loss, with the worker's recurrent state if `carry_state` is true."""
        if not self.args.carry_state:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        slot = self.carried.slot(model.training)
        inputs = self.carried.feed(slot, inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.carried.keep(slot, outputs)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The stock evaluation, at x; what components measure there is logged beside it."""
        for component in self._components:
            component.before_evaluate()
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock log, with what components add; a collective call while training."""
        for component in self._components:
            logs.update(component.logs(logs))
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`uploads.card`, or the stock card with the scheme, the base optimizer's real name, and the curves."""
        self.uploads.write_card(super().create_model_card, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """The stock upload, of x, with the statistics of BatchNorm that `save_model` saves."""
        self._prepare_saving(is_checkpoint=False)
        return super().push_to_hub(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock saving, of x."""
        self._prepare_saving(is_checkpoint=_internal_call)
        super().save_model(output_dir, _internal_call)

    def _prepare_saving(self, is_checkpoint: bool) -> None:
        if (optimizer := self.extrapolated) is not None and self.extrap_config.direction != "none":
            # A pass may have been interrupted at y.
            optimizer.restore()
        for component in self._components:
            component.before_save(is_checkpoint)

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._writer.folder_of(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.local_sgd.average()
        folder = Path(self._get_output_dir(trial))
        with self._writer.writing(folder):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / f"checkpoint-{self.state.global_step}"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload may run in the background, and the checkpoint is still to be renamed.
        if not self._writer.is_writing:
            self.uploads.before_checkpoint(Path(checkpoint_folder))
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.extrapolated is not None:
            states = [component.state() for component in self._components]
            save_rank_state(output_dir, self.args.process_index, self.accelerator.num_processes, states)
            self.local_sgd.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint_matches(resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            check_whole(Path(self.state.best_model_checkpoint), self.args.checkpoint_integrity)
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.extrapolated is not None:
            self._connect(self.model_wrapped)
            state = load_rank_state(checkpoint, self.args.process_index, self.accelerator.num_processes)
            for component in self._components:
                component.load(state)
            self.local_sgd.restore(checkpoint)


class ExtrapTrainer(ExtrapTrainerMixin, Trainer):
    """`transformers.Trainer` with extrapolation."""


class ExtrapSeq2SeqTrainer(ExtrapTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with extrapolation."""


__all__ = ["ExtrapSeq2SeqTrainer", "ExtrapTrainer", "ExtrapTrainerMixin"]
