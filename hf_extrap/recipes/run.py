"""One run from a resolved configuration: build, train, evaluate, write the results."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import wait_for_everyone
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed

from hf_extrap.optim.distributed import let_gloo_finish
from hf_extrap.recipes.baseline import find_baseline
from hf_extrap.recipes.configuration import Configuration
from hf_extrap.recipes.hardware import hardware
from hf_extrap.recipes.model_card import make_card
from hf_extrap.recipes.precision import NO_BF16, cpu_has_bf16
from hf_extrap.recipes.recording import ConciseProgress, RunRecorder, replicas_agree
from hf_extrap.recipes.run_folder import RunFolder
from hf_extrap.recipes.secrets import command_line
from hf_extrap.recipes.task import PreparedTask
from hf_extrap.training.callbacks import DivergenceStopper
from hf_extrap.training.checkpoints.finding import check_exists
from hf_extrap.training.checkpoints.matching import check_checkpoint_matches
from hf_extrap.training.extras import extra
from hf_extrap.training.figures import CURVES_FILE, draw_curves
from hf_extrap.training.model_card import optimizer_name
from hf_extrap.training.signals import stopping_on_signals
from hf_extrap.training.trainer import ExtrapSeq2SeqTrainer, ExtrapTrainer
from hf_extrap.training.versions import versions

logger = logging.getLogger(__name__)


def run(
    configuration: Configuration,
    command: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    print_logs: bool = True,
    stops_on_signals: bool = False,
) -> dict[str, Any]:
    """Train one model and write its results to `output_dir`.

    Every process of a distributed launch calls this; the first one writes.

    `command` is recorded, by default that of this process; `print_logs` is for runs without a progress bar;
    `stops_on_signals` lets SIGTERM and Ctrl-C end training with a checkpoint. A run that is to be resumed and has
    finished with the same fields is left as it is.

    Returns:
        The content of metrics.json. A run stopped by `abort_factor` has no `eval` and no `test`.

    Raises:
        ValueError: if the folder holds other files, the checkpoint belongs to another model, or this CPU has no LSTM in
            bf16.
        FileNotFoundError: if data or a checkpoint is missing.
        RuntimeError: if the replicas differ at the end.
        StoppedBySignal: if a signal has ended training.
    """
    arguments = configuration.training_arguments
    folder = RunFolder(Path(str(arguments.output_dir)))
    with folder.locked(arguments.process_index):
        return _run(configuration, folder, command, callbacks, print_logs, stops_on_signals)


def _run(
    configuration: Configuration,
    folder: RunFolder,
    command: str | None,
    callbacks: Sequence[TrainerCallback],
    print_logs: bool,
    stops_on_signals: bool,
) -> dict[str, Any]:
    arguments = configuration.training_arguments
    if configuration.run.save_model:
        with extra("recipes"):
            import matplotlib  # noqa: F401  (for the curves, at the end)
    resume = _resume(folder, arguments.resume_from_checkpoint)
    # A finished run need not have kept a checkpoint.
    finished = folder.is_finished and str(resume).lower() == "true"
    resumed = finished or check_exists(resume, folder.path)
    folder.check(configuration.given, resume=resumed)
    if resumed and folder.is_finished:
        return folder.read_metrics()
    command = command or command_line(sys.argv[1:])
    first = arguments.process_index == 0
    # The first process writes after all have checked the folder.
    wait_for_everyone()
    if first and not folder.has_begun:
        folder.write_configuration({"arguments": configuration.given, "command": command, "versions": versions()})

    if arguments.deepspeed is not None and arguments.world_size > 1:
        import deepspeed

        # Stage 3 needs the process group to build the model, before the Trainer exists.
        deepspeed.init_distributed(auto_mpi_discovery=False)
    set_seed(arguments.seed)
    prepared = configuration.task.prepare(configuration.task_arguments, arguments)
    check_size(configuration, prepared)
    recorder = RunRecorder(folder)
    trainer = make_trainer(configuration, prepared)
    _check_precision(trainer, prepared.model)
    if not print_logs:
        trainer.remove_callback(PrinterCallback)
    stopper = DivergenceStopper(configuration.run.abort_factor) if configuration.run.abort_factor else None
    for callback in (recorder, *((stopper,) if stopper else ()), *callbacks):
        trainer.add_callback(callback)
    if resumed and str(resume).lower() != "true":
        # A checkpoint of this folder is of this model. DeepSpeed would load another one's without a check.
        check_checkpoint_matches(str(resume), prepared.model)
    untrained = _evaluate_untrained(configuration, trainer, folder, resumed=resumed)

    began = time.perf_counter()
    with stopping_on_signals(trainer) if stops_on_signals else nullcontext():
        trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - began
    model = trainer.accelerator.unwrap_model(trainer.model)
    identical = replicas_agree(model)
    if identical is not None:
        identical &= recorder.replicas_identical
    diverged_at = stopper.step if stopper else None
    validation: dict[str, Any] = {}
    test = None
    if diverged_at is None:
        validation = _last_evaluation(trainer) or trainer.evaluate(metric_key_prefix="eval")
        test = _evaluate_test(trainer, prepared)
    if configuration.run.save_model and not arguments.push_to_hub:
        trainer.save_model()

    numbers = [validation.get(f"eval_{name}", math.nan) for name in (prepared.metric, "loss")]
    items = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    metrics: dict[str, Any] = {
        "status": "finished" if all(map(math.isfinite, numbers)) else "diverged",
        "diverged_at": diverged_at,
        "task": configuration.task.name,
        "preset": arguments.extrap,
        "extrap": arguments.extrap_config().to_dict(),
        "metric": prepared.metric,
        "greater_is_better": prepared.greater_is_better,
        "untrained": untrained,
        "eval": validation,
        "test": test,
        **_progress(trainer, prepared, recorder),
        "train_seconds": seconds,
        "wall_clock_seconds": time.perf_counter() - began,
        "world_size": arguments.world_size,
        "virtual_workers": arguments.extrap_virtual_workers,
        "accumulation": arguments.gradient_accumulation_steps,
        "global_batch": items,
        "global_batch_units": items * prepared.batch_size_unit,
        "ranks_identical": identical,
        "optimizer": optimizer_name(trainer.optimizer),
        "peak_learning_rate": max((row["learning_rate"] for row in _rows(trainer, "learning_rate")), default=None),
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        "device": str(arguments.device),
        "hardware": hardware(arguments.device),
        "resumed_from": trainer.resumed_from.name if trainer.resumed_from else None,
        "arguments": configuration.given,
        "facts": prepared.facts,
        "versions": versions(),
        "command": command,
    }
    if first:
        folder.write_history(recorder.history(trainer.state))
        if configuration.run.save_model:
            title = f"{metrics['task'].replace('_', ' ')}, preset {metrics['preset']}"
            drawn = draw_curves(folder.read_history(), prepared.metric, folder.path / CURVES_FILE, title)
            figure, baseline = CURVES_FILE if drawn else None, find_baseline(folder.path, metrics)
            trainer.uploads.card = make_card(metrics, model, figure, baseline, getattr(trainer, "hub_model_id", None))
            trainer.create_model_card()
    if configuration.run.save_model and arguments.push_to_hub:
        # With this card and figure; it saves the model first.
        trainer.push_to_hub()
    if first:
        # Last, since its presence marks a finished run.
        folder.write_metrics(metrics)
    wait_for_everyone()
    let_gloo_finish()
    if identical is False:
        raise RuntimeError(f"the replicas differ after training; see ranks_identical in {folder.path}.")
    return metrics


def make_trainer(configuration: Configuration, prepared: PreparedTask) -> ExtrapTrainer | ExtrapSeq2SeqTrainer:
    """Return the Trainer of a configuration and its prepared task."""
    trainer_class = ExtrapSeq2SeqTrainer if configuration.task.seq2seq else ExtrapTrainer
    names = "model train_dataset eval_dataset data_collator processing_class compute_metrics".split()
    given = {name: getattr(prepared, name) for name in (*names, "preprocess_logits_for_metrics")}
    trainer = trainer_class(args=configuration.training_arguments, **given)
    trainer.batch_size_unit = prepared.batch_size_unit
    trainer.augment = prepared.augment
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ConciseProgress(prepared.metric))
    return trainer


def check_size(configuration: Configuration, prepared: PreparedTask) -> None:
    """Refuse training data that do not fill one global batch: a worker would have none of it."""
    arguments, found = configuration.training_arguments, len(prepared.train_dataset)  # type: ignore[arg-type]
    factors = (arguments.train_batch_size, arguments.gradient_accumulation_steps, arguments.world_size)
    if found < math.prod(factors):
        raise ValueError(
            f"the training data have {found} items and one step takes {math.prod(factors)} ({factors[0]} per batch x "
            f"{factors[1]} accumulated batches x {factors[2]} processes); allowed: at least one step per epoch."
        )


def _check_precision(trainer: Trainer, model: PreTrainedModel) -> None:
    """On a CPU without bf16 instructions, warn that bf16 is slow and refuse an LSTM, which PyTorch lacks there."""
    if trainer.accelerator.mixed_precision != "bf16" or trainer.args.device.type != "cpu" or cpu_has_bf16():
        return
    if any(isinstance(module, nn.LSTM) for module in model.modules()):
        raise ValueError("bf16 is true, and PyTorch has no LSTM in bf16 for this CPU; allowed: --bf16 false.")
    if trainer.is_world_process_zero():
        logger.warning("bf16 is true, and this CPU %s; --bf16 false disables it", NO_BF16)


def _resume(folder: RunFolder, resume: str | None) -> str | None:
    """The given value; a job that torchrun has restarted resumes by itself, or starts anew if it has saved nothing."""
    saved = folder.is_finished or folder.last_checkpoint() is not None
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and saved:
        return "true"
    return resume


def _evaluate_untrained(
    configuration: Configuration, trainer: Trainer, folder: RunFolder, resumed: bool
) -> dict[str, Any] | None:
    arguments = configuration.training_arguments
    if resumed:
        return folder.read_configuration().get("untrained")
    # An untrained model generates up to the length limit, and an engine owns the weights only in training.
    skipped = (
        getattr(arguments, "predict_with_generate", False) or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    )
    if skipped or not configuration.run.evaluate_untrained:
        return None
    found = trainer.evaluate(metric_key_prefix="untrained")
    # Training starts from the same random state with and without this evaluation.
    set_seed(arguments.seed)
    if arguments.process_index == 0:
        folder.write_configuration({**folder.read_configuration(), "untrained": found})
    return found


def _last_evaluation(trainer: Trainer) -> dict[str, Any] | None:
    """The evaluation after the last step, if there was one and no other weights were loaded since."""
    if trainer.args.load_best_model_at_end:
        return None
    rows = [row for row in _rows(trainer, "eval_loss") if row.get("step") == trainer.state.global_step]
    return {name: value for name, value in rows[-1].items() if name not in ("step", "epoch")} if rows else None


def _evaluate_test(trainer: Trainer, prepared: PreparedTask) -> dict[str, Any] | None:
    if prepared.test_dataset is None:
        return None
    options: dict[str, Any] = {}
    if getattr(trainer.args, "predict_with_generate", False):
        # Evaluations during training may use fewer beams.
        options["num_beams"] = prepared.model.generation_config.num_beams
    return {**trainer.evaluate(prepared.test_dataset, metric_key_prefix="test", **options), **options}


def _progress(trainer: Trainer, prepared: PreparedTask, recorder: RunRecorder) -> dict[str, Any]:
    state, step_seconds = trainer.state, recorder.seconds_per_step
    epochs_per_step = state.epoch / state.global_step if state.epoch and state.global_step else None
    rate = epochs_per_step / step_seconds if epochs_per_step and step_seconds else None
    return {
        "steps": state.global_step,
        "epochs": state.epoch,
        "seconds_per_step": step_seconds,
        "data_seconds_per_step": recorder.data_seconds_per_step,
        "samples_per_second": rate * prepared.samples_per_epoch if rate and prepared.samples_per_epoch else None,
        "tokens_per_second": rate * prepared.tokens_per_epoch if rate and prepared.tokens_per_epoch else None,
        "train_loss": next((row["loss"] for row in reversed(_rows(trainer, "loss"))), None),
    }


def _rows(trainer: Trainer, key: str) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if key in row]
