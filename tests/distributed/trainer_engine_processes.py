"""Run by torchrun: the Trainer under one stage of DeepSpeed; a process leaves stage_S_R.pt in the folder given.

torchrun ... trainer_engine_processes.py FOLDER STAGE
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.ops
import torch
from torch import Tensor
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from leaving import save_and_leave  # noqa: E402
from tiny_trainer import gpt2, make, train  # noqa: E402

# Its own extension for shared memory would have to be compiled first.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

COMMON: dict[str, Any] = {
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.5,
    "sgd_momentum": 0.9,
    "sgd_nesterov": True,
}
OWN: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
GLOBAL = ["none", "extragradient", "optimistic", "past-update"]
PRESETS = {0: [*GLOBAL, "extrap", "extrap-past"], 2: [*GLOBAL, "extrap", "extrap-past", "sam"], 3: GLOBAL}
RESUMED = {0: "extrap-past", 2: "extrap-past", 3: "optimistic"}


def whole(trainer: Trainer) -> Tensor:
    """All parameters as one vector, in every process."""
    params = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    with deepspeed.zero.GatheredParameters(params):
        return torch.cat([p.detach().flatten() for p in params])


class Warnings(logging.Handler):
    """Keeps the warnings of the package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def main(folder: Path, stage: int) -> None:
    warnings = Warnings()
    logging.getLogger("hf_extrap").addHandler(warnings)
    seen: dict[str, Any] = {}
    engine = {"deepspeed": configuration(stage)}
    for preset in PRESETS[stage]:
        for steps in (1, 2):
            trainer = train(folder / "equivalent", extrap=preset, extrap_virtual_workers=steps, **engine, **COMMON)
            assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine" and trainer.args.world_size == 2
            assert trainer.model_wrapped.zero_optimization_stage() == stage
            seen[f"{preset} {steps}"] = whole(trainer)
            seen[f"{preset} {steps} logs"] = [row for row in trainer.state.log_history if "loss" in row]
    preset = RESUMED[stage]
    fields = {"extrap": preset, "eval_strategy": "steps", "eval_steps": 2, **engine, **COMMON}
    seen["with evaluations"] = whole(train(folder / "busy", **fields))
    warnings.texts.clear()
    saving = {**fields, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    uninterrupted = train(folder / "whole", model=gpt2(dropout=0.1), **saving)
    seen["whole"] = whole(uninterrupted)
    seen["checkpoints"] = sorted(path.name for path in (folder / "whole").glob("checkpoint-*"))
    # Killed after step 3, one past its last checkpoint.
    killed = make(folder / "killed", model=gpt2(dropout=0.1), **saving)
    stop_after(killed, 3)
    killed.train()
    resumed = train(folder / "killed", model=gpt2(dropout=0.1), resume=True, **saving)
    seen["resumed"] = whole(resumed)
    seen["files"] = sorted(path.name for path in (folder / "whole" / "checkpoint-6").glob("extrap_rank_*"))
    seen["warnings"] = list(warnings.texts)
    resumed.save_model(str(folder / "saved"))
    if stage != 3:
        try:
            make(folder / "refused", extrap="extrap", deepspeed={**configuration(stage), **OWN}, **COMMON)
        except ValueError as error:
            seen["refusal"] = str(error)
    else:
        try:
            make(folder / "refused", extrap="extrap-past", **engine, **COMMON)
        except ValueError as error:
            seen["refusal"] = str(error)
    save_and_leave(seen, folder, f"stage_{stage}")


def configuration(stage: int) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }


def stop_after(trainer: Trainer, step: int) -> None:
    """End a run early, without saving."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= step
            control.should_save &= state.global_step < step

    trainer.add_callback(Stop())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
