"""The Trainer with extrapolation: wiring of Extrapolated into transformers' loop."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.local_sgd import LocalSGD
from hf_extrap.optim.random import generator_for

from .arguments import ExtrapArguments
from .base import refuse
from .batch_norm import BatchNormMixin
from .batched_workers import BatchedWorkersMixin, first_rows
from .carried_state import CarriedState
from .local_sgd import LocalSGDMixin
from .optimizers import base_optimizer
from .reporting import EVALUATION
from .resuming import ResumingMixin
from .scaling import scaled_learning_rate_factor, step_decay
from .sharpness import SharpnessMixin

logger = logging.getLogger(__name__)

Inputs = dict[str, Any]


class ExtrapTrainerMixin(LocalSGDMixin, BatchedWorkersMixin, BatchNormMixin, SharpnessMixin, ResumingMixin):
    """Extrapolation for any Trainer: `class MyTrainer(ExtrapTrainerMixin, SomeTrainer)`.

    Its arguments need the fields of `ExtrapArguments`. Gradients are taken at y; whatever the loop does between its
    forward and backward passes (clipping, evaluation, saving, uploading, callbacks) sees the parameters x.

    Attributes:
        batch_size_unit: how many units, such as tokens, one item of the dataset counts for `lr_scaling` and the
            gradient noise scale.
        augment: changes a training micro-batch that is on its device, at random by the generator alone.
    """

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
        self._extrap_config = self.args.extrap_config()
        self._extrapolates = self._extrap_config.direction != "none"
        self._refuse_unsupported_engines()
        if self._extrapolates:
            # A worker's gradient is that of its own mean loss, so its units are known.
            self.model_accepts_loss_kwargs = False
        self._loss_kwargs_checked = not self.model_accepts_loss_kwargs
        self._carried = CarriedState()
        self._micro_batch = 0
        self._step_batches: list[Inputs] = []
        self._step_states: dict[str, Tensor] = {}
        self._earlier_batches: list[Inputs] = []
        self._earlier_states: dict[str, Tensor] = {}
        self._start_reporting()
        self._start_sharpness()
        self._start_batch_norm()
        self._start_batched_workers()
        self._start_local_sgd()

    def _refuse_unsupported_engines(self) -> None:
        if not self._extrapolates:
            return
        deepspeed: dict[str, Any] = {}
        if self.is_deepspeed_enabled:
            deepspeed = self.accelerator.state.deepspeed_plugin.deepspeed_config
        stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
        sharded = "ZeRO-3" if stage == 3 else "FSDP" if self.is_fsdp_enabled else None
        field = f"extrap is {self.args.extrap!r}"
        refuse(
            field,
            {"the DeepSpeed configuration has an optimizer of its own": "optimizer" in deepspeed},
            "no `optimizer` there, but `optim` or `base_optimizer` among the arguments, or extrap 'none'",
        )
        for engine, given, runs in (
            ("FSDP", self.args.fsdp, self.is_fsdp_enabled),
            ("DeepSpeed", self.args.deepspeed, self.is_deepspeed_enabled),
        ):
            asked = bool(given) or os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true"
            refuse(
                field,
                {
                    f"{engine} is asked for, but accelerate runs {self.accelerator.distributed_type.value}": asked
                    and not runs
                },
                f"a machine on which it runs {engine} (`hf-extrap doctor` says which), or a launch without it",
            )
        refuse(
            field,
            {
                "the engine is FSDP of version 1": self.is_fsdp_enabled
                and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2
            },
            "fsdp_version 2, or extrap 'none'",
        )
        refuse(
            field,
            {
                f"the engine is {sharded}, where no worker has weights of its own": sharded is not None
                and self._extrap_config.scope == "local"
            },
            "extrap_scope 'global' (extragradient, optimistic, past-update, noise), or DDP or ZeRO stages 0 to 2",
        )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, dataloader = super()._prepare_for_training(*args, **kwargs)
        self._connect(model)
        return model, dataloader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The stock training, also after an evaluation.

        An evaluation marks the bare model as prepared, and accelerate would then not wrap it for DDP: each process
        would train alone.
        """
        vars(self.model).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    # Optimizer and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The base optimizer, its learning rate scaled to the batch, inside `Extrapolated`."""
        ours = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if ours:
            factor = self._learning_rate_factor()
            for group in optimizer.param_groups:
                if group.get("lr") is not None:
                    group["lr"] *= factor
        prepared = isinstance(optimizer, AcceleratedOptimizer) or self.extrapolated is not None
        if not prepared:
            if self.args.local_steps > 1:
                optimizer = LocalSGD(optimizer, self.args.local_steps, virtual_workers=self.args.extrap_virtual_workers)
            self.optimizer = optimizer = self._client_optimizer = Extrapolated(
                optimizer,
                self._extrap_config,
                virtual_workers=self.args.extrap_virtual_workers,
                grad_scaler=self.accelerator.scaler,
            )
        return optimizer

    def _learning_rate_factor(self) -> float:
        if self.args.lr_scaling == "none" or self.args.base_batch_size is None:
            return 1.0
        batch_size = self.get_total_train_batch_size(self.args) * self.batch_size_unit
        factor = scaled_learning_rate_factor(self.args.lr_scaling, batch_size, self.args.base_batch_size)
        logger.info("learning rate times %.4g: %s scaling to a batch of %.6g", factor, self.args.lr_scaling, batch_size)
        return factor

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """The one that `base_optimizer` names, or the stock choice, with momentum for `optim: sgd`."""
        if isinstance(args, ExtrapArguments) and args.base_optimizer is not None:
            return base_optimizer(args, args.base_optimizer)
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if isinstance(args, ExtrapArguments) and args.sgd_momentum:
            kwargs |= {"momentum": args.sgd_momentum, "nesterov": args.sgd_nesterov}
        return optimizer_class, kwargs

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The stock scheduler, or step decay where `lr_milestones` are given."""
        if self.lr_scheduler is None and self.args.lr_milestones:
            warmup = self.args.get_warmup_steps(num_training_steps)
            rate = step_decay(num_training_steps, warmup, self.args.lr_milestones, self.args.lr_milestone_factor)
            self.lr_scheduler = LambdaLR(optimizer or cast(torch.optim.Optimizer, self.optimizer), rate)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # One step

    def get_batch_samples(self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device) -> Any:
        """The step's micro-batches; what a step must know before its first pass is set here."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and not self._loss_kwargs_checked and num_items is not None:
            self._check_loss_kwargs(batches[0])
            num_items = num_items if self.model_accepts_loss_kwargs else None
        if self.augment is not None:
            batches = [self._augmented(inputs, index) for index, inputs in enumerate(batches)]
        self._earlier_batches, self._earlier_states = self._step_batches, self._step_states
        self._step_batches = batches
        self._micro_batch = 0
        if self.state.epoch is None or float(self.state.epoch).is_integer():
            # The streams of a new epoch begin at their beginning.
            self._carried.reset()
        self._step_states = self._carried.tensors()
        self._keep_for_sharpness(batches)
        self._keep_for_batch_norm(batches)
        if (optimizer := self.extrapolated) is not None:
            if optimizer.virtual_workers > 1 and batches:
                optimizer.loss_scale = 1 / len(batches)
            optimizer.collect_statistics = self._logs_after_this_step()
        return batches, num_items

    def _augmented(self, inputs: Inputs, micro_batch: int) -> Inputs:
        """A micro-batch, augmented once for all its passes, alike for a virtual worker and for a process."""
        assert self.augment is not None
        inputs = self._prepare_inputs(inputs)
        worker = micro_batch * self.args.world_size + self.args.process_index
        key = ("augmentation", self.args.seed, self.state.global_step, worker)
        return self.augment(inputs, generator_for(self.args.device, *key))

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> Tensor:
        """One worker's pass: a fresh direction where the scheme has one, x → y, forward and backward at y, y → x."""
        optimizer = self.extrapolated
        if optimizer is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.args.batch_workers:
            loss = self._batched_training_step(model, optimizer, self._micro_batch, num_items_in_batch)
        else:
            loss = self._worker_step(model, optimizer, inputs, num_items_in_batch)
        self._micro_batch += 1
        # DeepSpeed has taken the step by now.
        whole = self._micro_batch == len(self._step_batches) and not self.is_deepspeed_enabled
        if optimizer.collect_statistics and whole:
            optimizer.observe()
        return loss

    def _worker_step(self, model: nn.Module, optimizer: Extrapolated, inputs: Inputs, num_items: Any) -> Tensor:
        self._last_pass = (inputs, self._carried.of(self._slot))
        worker = self._micro_batch if optimizer.virtual_workers > 1 else 0
        with self._statistics_of_first_worker(model, worker):
            if not (self._extrapolates or optimizer.collect_statistics or self._has_engine):
                return super().training_step(model, inputs, num_items)
            if optimizer.wants_probe:
                self._probe(model, optimizer, worker)
            optimizer.train(worker=worker)
            loss = super().training_step(model, inputs, num_items)
            optimizer.restore()
            return loss

    def _probe(self, model: nn.Module, optimizer: Extrapolated, worker: int) -> None:
        """Take the worker's gradient at x, over what the pass at y will see, or over its fraction or other samples."""
        micro_batches = range(len(self._step_batches))
        if optimizer.virtual_workers > 1 and self._extrap_config.scope == "local":
            micro_batches = range(self._micro_batch, self._micro_batch + 1)
        (batches, states), current = self._probed(), self._carried.tensors()
        model.train()
        first = self._micro_batch
        if states is not None:
            self._carried.load(states, self.args.device)
        with optimizer.probing(worker=worker, model=model) as backward, self._probing():
            for index in micro_batches:
                self._micro_batch = index
                with self._averaging(model, index == micro_batches[-1], first == len(self._step_batches) - 1):
                    self._probe_pass(model, batches[index], backward)
        self._micro_batch = first
        self._carried.load(current, self.args.device)

    def _probed(self) -> tuple[list[Inputs], dict[str, Tensor] | None]:
        """The micro-batches that a fresh direction sees, and the recurrent states if they are not the current ones."""
        if self._extrap_config.batch == "independent" and len(self._earlier_batches) >= len(self._step_batches):
            return self._earlier_batches, self._earlier_states
        return self._step_batches, None

    def _probe_pass(self, model: nn.Module, inputs: Inputs, backward: Callable[[Tensor], None]) -> None:
        inputs = self._prepare_inputs(first_rows(inputs, self._extrap_config.batch_fraction))
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        self._pass_back(loss / self.current_gradient_accumulation_steps, backward)

    @contextmanager
    def _averaging(self, model: nn.Module, last: bool, step_averages: bool) -> Iterator[None]:
        """Average a global direction with the last of its passes, and then again as the step wants it."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            yield
            model.set_requires_gradient_sync(step_averages)
            return
        if self._extrap_config.scope == "local" or not isinstance(model, DistributedDataParallel):
            yield
            return
        before = model.require_backward_grad_sync
        model.require_backward_grad_sync = last
        try:
            yield
        finally:
            model.require_backward_grad_sync = before

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stock loss, with the worker's recurrent state where `carry_state` asks for it."""
        if not self.args.carry_state:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        slot = self._slot if model.training else EVALUATION
        inputs = self._carried.feed(slot, inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not self._is_probing:
            self._carried.keep(slot, outputs)
        return (loss, outputs) if return_outputs else loss

    @property
    def _slot(self) -> str:
        return f"worker {self._micro_batch}"

    def _check_loss_kwargs(self, inputs: Inputs) -> None:
        """Find out by trying whether the loss heeds `num_items_in_batch`.

        A model that takes `**kwargs` and ignores it gets gradients too large by accumulation steps times processes.
        """
        self._loss_kwargs_checked = True
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), self.compute_loss_context_manager():
                one, two = (
                    float(cast(Tensor, super(ExtrapTrainerMixin, self).compute_loss(model, batch, False, count)))
                    for batch, count in (
                        (self._prepare_inputs(dict(inputs)), torch.tensor(n)) for n in (1000.0, 2000.0)
                    )
                )
        finally:
            model.train(was_training)
        if one != 0 and math.isclose(one, two, rel_tol=1e-3):
            logger.warning(
                "%s takes num_items_in_batch and ignores it: micro-batches and processes are averaged instead",
                type(model).__name__,
            )
            self.model_accepts_loss_kwargs = False


class ExtrapTrainer(ExtrapTrainerMixin, Trainer):
    """`transformers.Trainer` with extrapolation."""


class ExtrapSeq2SeqTrainer(ExtrapTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with extrapolation."""


__all__ = ["ExtrapSeq2SeqTrainer", "ExtrapTrainer", "ExtrapTrainerMixin"]
