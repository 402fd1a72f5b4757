"""Run by torchrun: trains every cell with DistributedDataParallel; a process leaves rank_R.pt in the folder given."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from hf_extrap import PRESETS
from tests.support.kept_warnings import Warnings
from tests.support.leaving import save_and_leave
from tests.support.tiny_trainer import gpt2, make, marian, train, weights

COMMON: dict[str, Any] = {
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.5,
    "sgd_momentum": 0.9,
    "sgd_nesterov": True,
}
# The checkpoint lies between two logged rows.
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 4}
MEASURED: dict[str, Any] = {"extrap": "extrap-past", "eval_strategy": "steps", "eval_steps": 3}
EQUIVALENT = [name for name in PRESETS if name not in ("gaussian", "smoothout")]


class LateFiles(TrainerCallback):
    """The second process saves its own files late, and looks whether the checkpoint counts as complete before."""

    is_complete = False

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        wrapper = optimizer.optimizer
        local_state_dict = wrapper.local_state_dict

        def late() -> dict[str, Any]:
            if args.process_index == 1:
                time.sleep(2)
                self.is_complete |= any(Path(args.output_dir).glob("*/trainer_state.json"))
            return local_state_dict()

        wrapper.local_state_dict = late


def losses(trainer: Trainer) -> list[float]:
    """The logged losses, the mean of the whole run last."""
    return [row[key] for row in trainer.state.log_history for key in ("loss", "train_loss") if key in row]


def main(folder: Path, single_process_checkpoint: str) -> None:
    warnings = Warnings()
    seen: dict[str, Any] = {}
    for preset in EQUIVALENT:
        for steps in (1, 2):
            fields = {"extrap": preset, "extrap_virtual_workers": steps}
            trainer = train(folder / "equivalent", **fields, **COMMON)
            assert isinstance(trainer.model_wrapped, DistributedDataParallel) and trainer.args.world_size == 2
            seen[f"{preset} {steps}"] = weights(trainer)
            seen[f"{preset} {steps} logs"] = [row for row in trainer.state.log_history if "loss" in row]
    stock = {"optim": "adamw_torch", "max_grad_norm": 0.5}
    seen["stock"] = weights(train(folder / "stock", kind=Trainer, model=gpt2(dropout=0.1), **stock))
    seen["none"] = weights(train(folder / "none", model=gpt2(dropout=0.1), **stock))
    for extrap in ("none", "extrap-past"):
        scale = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 1}
        trainer = train(folder / "scale", model=marian(), extrap=extrap, **scale, train_sampling_strategy="sequential")
        seen[f"gradient norm {extrap}"] = trainer.state.log_history[0]["grad_norm"]
    evaluated = make(folder / "evaluated", extrap="extrap-past", **COMMON)
    evaluated.evaluate()
    evaluated.train()
    assert isinstance(evaluated.model_wrapped, DistributedDataParallel)
    seen["evaluated first"] = weights(evaluated)
    for preset in ("extrap", "extragradient"):
        busy = train(folder / "busy", extrap=preset, eval_strategy="steps", eval_steps=2, **COMMON)
        seen[f"{preset} with evaluations"] = weights(busy)
    measured = train(folder / "measured", sharpness_batches=1, **MEASURED, **COMMON)
    seen["sharpness"] = [row["extrap/sharpness"] for row in measured.state.log_history if "extrap/sharpness" in row]
    seen["measured"] = weights(measured)
    warnings.texts.clear()
    for preset in ("extrap-past", "smoothout"):
        fields = {"extrap": preset, "extrap_virtual_workers": 2, **COMMON, **SAVING}
        whole = train(folder / preset, model=gpt2(dropout=0.1), **fields)
        seen[f"{preset} whole"], seen[f"{preset} whole losses"] = weights(whole), losses(whole)
        checkpoint = str(folder / preset / "checkpoint-3")
        resumed = train(folder / f"{preset}-resumed", model=gpt2(dropout=0.1), resume=checkpoint, **fields)
        seen[f"{preset} resumed"], seen[f"{preset} resumed losses"] = weights(resumed), losses(resumed)
        checkpoint = str(folder / preset / "checkpoint-6")
        finished = train(folder / f"{preset}-resumed", model=gpt2(dropout=0.1), resume=checkpoint, **fields)
        seen[f"{preset} finished"], seen[f"{preset} finished steps"] = weights(finished), finished.state.global_step
    late = LateFiles()
    train(folder / "late", extrap="extrap-past", **COMMON, **SAVING, callbacks=[late], max_steps=3)
    seen["complete too early"] = late.is_complete
    torn = folder / "torn" / "checkpoint-3"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "extrap-past" / "checkpoint-3", torn)
        (torn / "extrap_rank_1.safetensors").unlink()
    dist.barrier()
    try:
        train(folder / "torn", extrap="extrap-past", resume=str(torn), **COMMON, **SAVING)
    except FileNotFoundError as error:
        seen["torn"] = str(error)
    assert not warnings.texts, warnings.texts
    grown = train(folder / "grown", extrap="extrap-past", resume=single_process_checkpoint, **COMMON, **SAVING)
    seen["grown"], seen["grown steps"], seen["warnings"] = weights(grown), grown.state.global_step, warnings.texts
    save_and_leave(seen, folder, "rank")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
