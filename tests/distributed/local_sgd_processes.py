"""Run by torchrun: post-local SGD with DistributedDataParallel; a process leaves local_R.pt in the folder given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_extrap.recipes.recording import replicas_agree
from tests.support.leaving import save_and_leave
from tests.support.tiny_trainer import gpt2, train, weights

COMMON: dict[str, Any] = {
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.5,
    "max_steps": 9,
    "extrap": "extrap-past",
    "extrap_step_ratio": 0.5,
    "local_steps": 3,
    "local_sgd_start": 0.3,
    "eval_strategy": "steps",
    "eval_steps": 4,
}
CELLS: dict[str, dict[str, Any]] = {
    "nesterov": {"sgd_momentum": 0.9, "sgd_nesterov": True},
    "adamw": {"optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-3},
}


class Replicas(TrainerCallback):
    """Compares the parameters of all processes after every step, as RunRecorder does after every epoch."""

    def __init__(self) -> None:
        self.agreed: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agreed.append(replicas_agree(kwargs["model"]))


def main(folder: Path) -> None:
    seen: dict[str, Any] = {}
    for name, fields in CELLS.items():
        for workers in (1, 2):
            replicas = Replicas()
            more = {**COMMON, **fields, "extrap_virtual_workers": workers}
            trainer = train(folder / "out", **more, callbacks=[replicas])
            assert isinstance(trainer.model_wrapped, DistributedDataParallel) and trainer.args.world_size == 2
            seen[f"{name} {workers}"] = weights(trainer)
            seen[f"{name} {workers} agreed"] = replicas.agreed
            logs = trainer.state.log_history
            seen[f"{name} {workers} losses"] = [row["eval_loss"] for row in logs if "eval_loss" in row]
    saving = {**COMMON, **CELLS["adamw"], "save_strategy": "steps", "save_steps": 4}
    seen["whole"] = weights(train(folder / "whole", model=gpt2(dropout=0.1), **saving))
    resume = str(folder / "whole" / "checkpoint-4")
    seen["resumed"] = weights(train(folder / "resumed", model=gpt2(dropout=0.1), resume=resume, **saving))
    save_and_leave(seen, folder, "local")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
