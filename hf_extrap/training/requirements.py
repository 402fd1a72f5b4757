"""What the Trainer refuses: engines and combinations of fields that cannot work, each in one sentence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_extrap.optim.batched_workers import check_batchable

if TYPE_CHECKING:
    from .trainer import ExtrapTrainerMixin


def check_requirements(trainer: ExtrapTrainerMixin) -> None:
    """Raise a ValueError that names a field, what it cannot be combined with, and what is allowed."""
    args, config = trainer.args, trainer.extrap_config
    engines = {"the engine is DeepSpeed": trainer.is_deepspeed_enabled, "the engine is FSDP": trainer.is_fsdp_enabled}
    loss_func = {"compute_loss_func is given": trainer.compute_loss_func is not None}
    common = {**engines, "fp16 is true": args.fp16, **loss_func}
    if config.direction != "none":
        _check_engine(trainer)
    scales = f"lr_scaling is {args.lr_scaling!r}"
    finds = {"auto_find_batch_size is true": args.lr_scaling != "none" and args.auto_find_batch_size}
    _refuse(scales, finds, "one of them, since the learning rate is that of the first batch size tried")
    _check_embeddings(args, trainer.model)
    if args.batch_workers:
        _refuse(
            "batch_workers is true",
            {
                "extrap_virtual_workers is 1": args.extrap_virtual_workers == 1,
                "carry_state is true": args.carry_state,
                "there are several processes": args.world_size > 1,
                "there are several devices": args.n_gpu > 1,
                **common,
                "torch_compile is true": args.torch_compile,
                "gradient_checkpointing is true": bool(args.gradient_checkpointing),
            },
            "several virtual workers in one process on one device, in float32 or bf16, without carry_state, "
            "torch_compile, gradient_checkpointing or compute_loss_func; or batch_workers false",
        )
        check_batchable(trainer.model)
    if args.local_steps > 1:
        workers = args.extrap_virtual_workers
        accumulation = f"gradient_accumulation_steps is {args.gradient_accumulation_steps}"
        _refuse(
            f"local_sgd_start is {args.local_sgd_start:g}",
            {f"extrap is {args.extrap!r}, which ends there": args.local_sgd_start == 0 and config.moves},
            "a share > 0, or extrap none",
        )
        _refuse(
            f"local_steps is {args.local_steps}",
            {
                "batch_workers is true": args.batch_workers,
                f"{accumulation} and extrap_virtual_workers {workers}": args.gradient_accumulation_steps != workers,
                **common,
            },
            "workers that are each a process of DDP or a virtual worker of one micro-batch, one after another, in "
            "float32 or bf16 and with the model's own loss; or local_steps 1",
        )
    if args.sharpness_batches:
        _refuse(f"sharpness_batches is {args.sharpness_batches}", engines, "one process or DDP, or sharpness_batches 0")


def _check_embeddings(args: Any, model: Any) -> None:
    if args.neftune_noise_alpha is None or not hasattr(model, "get_input_embeddings"):
        return
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        without = {f"the model is a {type(model).__name__}, which has no input embeddings": True}
        _refuse(f"neftune_noise_alpha is {args.neftune_noise_alpha}", without, "a language model, or none")


def check_deepspeed_runs(model: nn.Module) -> None:
    """Raise a ValueError unless accelerate has wrapped the model of a run with `deepspeed` in a DeepSpeed engine."""
    if not hasattr(model, "zero_optimization_stage"):
        raise ValueError(
            f"deepspeed is given, but the model is a {type(model).__name__}: accelerate has fallen back to another "
            "engine; allowed on the CPU: DS_ACCELERATOR=cpu, without ACCELERATE_USE_CPU."
        )


def _check_engine(trainer: ExtrapTrainerMixin) -> None:
    args, accelerator, field = trainer.args, trainer.accelerator, f"extrap is {trainer.args.extrap!r}"
    plugin = accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    deepspeed: dict[str, Any] = plugin.deepspeed_config if plugin else {}
    own_optimizer = {"the DeepSpeed configuration has an optimizer of its own": "optimizer" in deepspeed}
    allowed = "no `optimizer` there, but `optim` or `base_optimizer` among the arguments, or extrap 'none'"
    _refuse(field, own_optimizer, allowed)
    engines = {
        "FSDP": (args.fsdp, trainer.is_fsdp_enabled),
        "DeepSpeed": (args.deepspeed, trainer.is_deepspeed_enabled),
    }
    for engine, (given, runs) in engines.items():
        asked = bool(given) or os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true"
        other = {f"{engine} is asked for, but accelerate runs {accelerator.distributed_type.value}": asked and not runs}
        allowed = f"a machine on which it runs {engine} (`hf-extrap doctor` says which), or a launch without it"
        _refuse(field, other, allowed)
    version = getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) if trainer.is_fsdp_enabled else 2
    _refuse(field, {"the engine is FSDP of version 1": version != 2}, "fsdp_version 2, or extrap 'none'")
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    is_local = trainer.extrap_config.scope == "local"
    without = "where no worker has weights of its own"
    sharded = {
        f"the engine is ZeRO-3, {without}": stage == 3 and is_local,
        f"the engine is FSDP, {without}": trainer.is_fsdp_enabled and is_local,
    }
    allowed = "extrap_scope 'global' (extragradient, optimistic, past-update, noise), or DDP or ZeRO stages 0 to 2"
    _refuse(field, sharded, allowed)


def _refuse(field: str, obstacles: Mapping[str, bool], allowed: str) -> None:
    """Raise a ValueError that names a field with its value, the first obstacle that applies, and what is allowed."""
    for obstacle, applies in obstacles.items():
        if applies:
            raise ValueError(f"{field} and {obstacle}; allowed: {allowed}.")
