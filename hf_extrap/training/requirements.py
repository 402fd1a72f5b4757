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
    """Check a Trainer before anything is built on it.

    Raises:
        ValueError: naming the field, what it cannot be combined with, and what is allowed.
    """
    args, config = trainer.args, trainer.extrap_config
    engines = {"the engine is DeepSpeed": trainer.is_deepspeed_enabled, "the engine is FSDP": trainer.is_fsdp_enabled}
    if config.direction != "none":
        _check_engine(trainer)
    if args.batch_workers:
        _refuse(
            "batch_workers is true",
            {
                "extrap_virtual_workers is 1": args.extrap_virtual_workers == 1,
                "carry_state is true": args.carry_state,
                "there are several processes": args.world_size > 1,
                "there are several devices": args.n_gpu > 1,
                **engines,
                "fp16 is true": args.fp16,
                "torch_compile is true": args.torch_compile,
                "gradient_checkpointing is true": bool(args.gradient_checkpointing),
                "compute_loss_func is given": trainer.compute_loss_func is not None,
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
                **engines,
                "fp16 is true": args.fp16,
                "compute_loss_func is given": trainer.compute_loss_func is not None,
            },
            "workers that are each a process of DDP or a virtual worker of one micro-batch, one after another, in "
            "float32 or bf16 and with the model's own loss; or local_steps 1",
        )
    if args.sharpness_batches:
        _refuse(f"sharpness_batches is {args.sharpness_batches}", engines, "one process or DDP, or sharpness_batches 0")


def check_deepspeed_runs(model: nn.Module) -> None:
    """Check the prepared model of a run with `deepspeed`.

    Raises:
        ValueError: accelerate has not wrapped it in a DeepSpeed engine.
    """
    if not hasattr(model, "zero_optimization_stage"):
        raise ValueError(
            f"deepspeed is given, but the model is a {type(model).__name__}: accelerate has fallen back to another "
            "engine; allowed on the CPU: DS_ACCELERATOR=cpu, without ACCELERATE_USE_CPU."
        )


def _check_engine(trainer: ExtrapTrainerMixin) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    field = f"extrap is {args.extrap!r}"
    deepspeed: dict[str, Any] = {}
    if trainer.is_deepspeed_enabled:
        deepspeed = accelerator.state.deepspeed_plugin.deepspeed_config
    _refuse(
        field,
        {"the DeepSpeed configuration has an optimizer of its own": "optimizer" in deepspeed},
        "no `optimizer` there, but `optim` or `base_optimizer` among the arguments, or extrap 'none'",
    )
    for engine, given, runs in (
        ("FSDP", args.fsdp, trainer.is_fsdp_enabled),
        ("DeepSpeed", args.deepspeed, trainer.is_deepspeed_enabled),
    ):
        asked = bool(given) or os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true"
        running = accelerator.distributed_type.value
        _refuse(
            field,
            {f"{engine} is asked for, but accelerate runs {running}": asked and not runs},
            f"a machine on which it runs {engine} (`hf-extrap doctor` says which), or a launch without it",
        )
    version = getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) if trainer.is_fsdp_enabled else 2
    _refuse(field, {"the engine is FSDP of version 1": version != 2}, "fsdp_version 2, or extrap 'none'")
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    sharded = "ZeRO-3" if stage == 3 else "FSDP" if trainer.is_fsdp_enabled else None
    _refuse(
        field,
        {
            f"the engine is {sharded}, where no worker has weights of its own": (
                sharded is not None and trainer.extrap_config.scope == "local"
            )
        },
        "extrap_scope 'global' (extragradient, optimistic, past-update, noise), or DDP or ZeRO stages 0 to 2",
    )


def _refuse(field: str, obstacles: Mapping[str, bool], allowed: str) -> None:
    """Raise a ValueError that names the first obstacle that applies.

    Args:
        field: the field with its value: `local_steps is 8`.
        obstacles: each in words, and whether it applies.
        allowed: what is, and what to give instead.
    """
    for obstacle, applies in obstacles.items():
        if applies:
            raise ValueError(f"{field} and {obstacle}; allowed: {allowed}.")
