"""Run by torchrun as `… FOLDER zero2`: the Trainer under one engine; a process leaves ENGINE_R.pt in the folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

from tests.support import cpu_deepspeed  # noqa: F401

# isort: split
import deepspeed
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from tests.distributed.trainer_processes import COMMON
from tests.support.fsdp_on_cpu import force_fsdp
from tests.support.kept_warnings import Warnings
from tests.support.leaving import save_and_leave
from tests.support.tiny_trainer import gpt2, make, train

GLOBAL = ["none", "extragradient", "optimistic", "past-update"]
PRESETS = {
    "zero0": [*GLOBAL, "extrap", "extrap-past"],
    "zero2": [*GLOBAL, "extrap", "extrap-past", "sam"],
    "zero3": GLOBAL,
    "fsdp2": GLOBAL,
}
RESUMED = {"zero0": "extrap-past", "zero2": "extrap-past", "zero3": "optimistic", "fsdp2": "optimistic"}
OWN: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}


class StopAfter(TrainerCallback):
    """Ends a run early, without saving."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
        control.should_save &= state.global_step < self.step


def main(folder: Path, engine: str) -> None:
    warnings = Warnings()
    seen: dict[str, Any] = {}
    fields = fsdp() if engine == "fsdp2" else {"deepspeed": zero(engine)}
    for preset in PRESETS[engine]:
        for steps in (1, 2):
            trainer = train(folder / "equivalent", extrap=preset, extrap_virtual_workers=steps, **fields, **COMMON)
            check(trainer, engine)
            seen[f"{preset} {steps}"] = whole(trainer)
            seen[f"{preset} {steps} logs"] = [row for row in trainer.state.log_history if "loss" in row]
    evaluated = {"extrap": RESUMED[engine], "eval_strategy": "steps", "eval_steps": 2, **fields, **COMMON}
    seen["with evaluations"] = whole(train(folder / "busy", **evaluated))
    warnings.texts.clear()
    saving = {**evaluated, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    seen["whole"] = whole(train(folder / "whole", model=gpt2(dropout=0.1), **saving))
    seen["checkpoints"] = sorted(path.name for path in (folder / "whole").glob("checkpoint-*"))
    seen["files"] = sorted(path.name for path in (folder / "whole" / "checkpoint-6").glob("extrap_rank_*"))
    # Killed one step after its last checkpoint.
    train(folder / "killed", model=gpt2(dropout=0.1), callbacks=[StopAfter(3)], **saving)
    resumed = train(folder / "killed", model=gpt2(dropout=0.1), resume=True, **saving)
    seen["resumed"] = whole(resumed)
    seen["warnings"] = list(warnings.texts)
    resumed.save_model(str(folder / "saved"))
    refused = {"extrap": "extrap", **fields, **COMMON}
    if engine in ("zero0", "zero2"):
        refused["deepspeed"] = {**zero(engine), **OWN}
    try:
        make(folder / "refused", **refused)
    except ValueError as error:
        seen["refusal"] = str(error)
    save_and_leave(seen, folder, engine)


def check(trainer: Trainer, engine: str) -> None:
    """The engine that was asked for, and not what it silently falls back to."""
    assert trainer.args.world_size == 2
    if engine == "fsdp2":
        assert isinstance(trainer.model_wrapped, FSDPModule)
    else:
        assert isinstance(trainer.model_wrapped, deepspeed.DeepSpeedEngine)
        assert f"zero{trainer.model_wrapped.zero_optimization_stage()}" == engine


def zero(engine: str) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True},
    }


def fsdp() -> dict[str, Any]:
    force_fsdp()
    wrapped = {"transformer_layer_cls_to_wrap": ["GPT2Block"], "state_dict_type": "FULL_STATE_DICT"}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2, **wrapped}}


def whole(trainer: Trainer) -> Tensor:
    """All parameters as one vector, in every process."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a pass without backward the root keeps its parameters gathered.
            module.reshard()
    params = list(model.parameters())
    if isinstance(params[0], DTensor):
        return torch.cat([cast(DTensor, p).detach().full_tensor().flatten() for p in params])
    with deepspeed.zero.GatheredParameters(params):
        return torch.cat([p.detach().flatten() for p in params])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
