"""What a run would be and cost, without training: its fields as YAML, and its cost as comments of that YAML."""

from __future__ import annotations

import copy
import math
import tempfile
from collections import defaultdict
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils._pytree import tree_leaves

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes.configuration import PROGRAM_DEFAULTS, Configuration
from hf_extrap.recipes.run import check_size, make_trainer
from hf_extrap.recipes.run_folder import plain
from hf_extrap.recipes.secrets import is_secret
from hf_extrap.recipes.task import PreparedTask, element_count
from hf_extrap.training.model_card import optimizer_name
from hf_extrap.training.trainer import ExtrapTrainerMixin

from .cost import Precision, communication, memory, preset_like, sent


def dry_run(configuration: Configuration) -> str:
    """Return the resolved fields as YAML that runs again, with what the run costs as comments.

    A collective call. Data are loaded and prepared, in a temporary folder, and the model is built; nothing is trained.

    Raises:
        FileNotFoundError, ValueError: as the run itself would.
    """
    arguments = configuration.training_arguments
    fields = resolved_fields(configuration)
    with tempfile.TemporaryDirectory(prefix="hf_extrap_") as folder:
        arguments.output_dir = configuration.task_arguments.data_cache_dir = folder
        prepared = configuration.task.prepare(configuration.task_arguments, arguments)
        check_size(configuration, prepared)
        trainer = make_trainer(configuration, prepared)
        rows = cost(trainer, prepared)
    width = max(map(len, rows)) + 2
    lines = [f"#   {name + ':':<{width}}{value}" for name, value in rows.items()]
    return "\n".join(
        [
            "# Nothing was trained. `hf-extrap train FILE` runs these fields:",
            yaml.safe_dump(fields, sort_keys=False, allow_unicode=True),
            "# What it costs, without activations and communication buffers:",
            *lines,
        ]
    )


def resolved_fields(configuration: Configuration) -> dict[str, Any]:
    """The fields that resolve to this configuration again, without secrets; null resets a default of the task."""
    task, given = configuration.task, configuration.given
    reset = dict.fromkeys(name for name in {**PROGRAM_DEFAULTS, **task.training_defaults()} if name not in given)
    output_dir = str(configuration.training_arguments.output_dir)
    fields = {"task": task.name, **given, **reset, "output_dir": output_dir}
    return {name: plain(value) for name, value in fields.items() if not is_secret(name)}


def cost(trainer: ExtrapTrainerMixin, prepared: PreparedTask) -> dict[str, str]:
    """What the run of a Trainer costs, by name; `prepared` is its task. Nothing is trained."""
    arguments, config = trainer.args, trainer.args.extrap_config()
    batches = len(trainer.get_train_dataloader())
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    items = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    workers = f"{arguments.world_size} × {arguments.extrap_virtual_workers} virtual"
    rows = {"steps": f"{steps:,} ({per_epoch:,} an epoch, {steps / per_epoch:.3g} epochs), {workers} workers"}
    if prepared.batch_size_unit == 1:
        rows["samples"] = f"{items:,} a step, {items * steps:,} in all"
    if prepared.tokens_per_epoch:
        tokens = prepared.tokens_per_epoch / per_epoch
        rows["tokens"] = f"about {tokens:,.0f} a step, {tokens * steps:,.0f} in all"
    gradients = "1 at y"
    if config.moves and config.is_fresh:
        gradients += f" + {config.batch_fraction:g} at x, for the direction"
    rows["gradients"] = f"{gradients}, per worker and step"
    return rows | _sizes(trainer, prepared, config)


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """Bytes of the state that an optimizer has after its first step, found by a step of a copy with its own tensors.

    They are on the meta device, without memory; on the CPU for an optimizer that reads their values. None if it cannot
    step alone, as one that needs a closure.
    """
    for device in ("meta", "cpu"):
        stepped = copy.copy(optimizer)
        # A fused step needs a real device.
        unfused: dict[str, Any] = {name: False for name in ("fused", "foreach") if name in optimizer.defaults}
        stepped.state, stepped.param_groups = defaultdict(dict), []
        for group in optimizer.param_groups:
            params = [nn.Parameter(torch.zeros_like(p, device=device)) for p in group["params"]]
            for p in params:
                p.grad = torch.zeros_like(p)
            stepped.param_groups.append({**group, **unfused, "params": params})
        try:
            stepped.step()
        # What an optimizer raises here is its own.
        except Exception:  # nosec B112
            continue
        leaves = [leaf for leaf in tree_leaves(list(stepped.state.values())) if isinstance(leaf, torch.Tensor)]
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    return None


def _sizes(trainer: ExtrapTrainerMixin, prepared: PreparedTask, config: ExtrapConfig) -> dict[str, str]:
    """Parameters, memory of a process and communication of a step."""
    arguments, parameters = trainer.args, list(prepared.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    count = sum(map(element_count, trained))
    frozen = sum(map(element_count, parameters)) - count
    optimizer = trainer.create_optimizer()
    state = optimizer_state_bytes(getattr(optimizer, "base", optimizer))
    engine, preset, ranks = _engine(trainer), preset_like(config), arguments.world_size
    element = max((p.element_size() for p in trained), default=4)
    half = trainer.is_deepspeed_enabled and (arguments.bf16 or arguments.fp16)
    precision = Precision(2, 2, 4, 0) if half else Precision(element, element, 0, 0)
    workers = arguments.extrap_virtual_workers
    swap = config.swap is not False and (bool(config.swap) or arguments.device.type == "cpu")
    held = memory(
        engine, preset, count, ranks, precision, virtual_workers=workers, swap=swap and not trainer.is_deepspeed_enabled
    )
    held["weights"] += frozen * precision.weights
    # The formulas count the bytes of the optimizer per element; the optimizer itself may know better.
    shards = ranks if engine in ("zero1", "zero2", "zero3") else 1
    held["optimizer"] += (state or 0) / shards
    if config.direction_dtype in ("bfloat16", "float16") and config.is_past:
        held["directions"] *= 2 / precision.gradients
    base, added = communication(engine, preset, count, ranks, precision)
    where = " in host memory" if config.direction_device == "cpu" and workers > 1 and config.is_local else ""
    communicated = "none, one process"
    if ranks > 1:
        reduced, more = (_bytes(sum(collective.size for collective in each)) for each in (base, added))
        communicated = f"{reduced} a step + {more} for the extrapolation; each process sends "
        communicated += _bytes(sent([*base, *added]))
    return {
        "parameters": f"{count + frozen:,}" + (f", {count:,} of them trained" if frozen else ""),
        "memory of parameters": _bytes(held["weights"]),
        "memory of gradients": _bytes(held["gradients"]),
        f"memory of {optimizer_name(optimizer)}": _bytes(held["optimizer"])
        if state is not None
        else "not known before its first step",
        "memory of x while at y": _bytes(held["x"]),
        "memory of directions": _bytes(held["directions"]) + where,
        "memory of a process": _bytes(sum(held.values())) + ("" if state is not None else " and the optimizer's"),
        "communication": communicated,
    }


def _engine(trainer: ExtrapTrainerMixin) -> str:
    """The engine's name in `hf_extrap.lab.cost.ENGINES`."""
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        return f"zero{stage}" if stage else "ddp"
    return "zero3" if trainer.is_fsdp_enabled else "ddp"


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e9 else f"{count / 1e6:,.3g} MB"
