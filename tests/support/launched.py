"""Run by a launcher: a few steps of the Trainer; process R leaves what really ran in FOLDER/rank_R.json.

... launched.py FOLDER PRESET [force_fsdp]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from tests.support.in_processes import leave
from tests.support.tiny_trainer import train


def main(folder: Path, preset: str, forced: bool) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from tests.support import cpu_deepspeed  # noqa: F401
    if forced:
        from tests.support.fsdp_on_cpu import force_fsdp

        force_fsdp()
    # An argument, and not ACCELERATE_USE_CPU, which would put DDP in the place of DeepSpeed.
    trainer = train(folder / "run", extrap=preset, use_cpu=True, learning_rate=0.5)
    engine: Any = trainer.model_wrapped
    weight = next(trainer.model.parameters())
    stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None
    seen = {
        "model": type(engine).__name__,
        "world_size": trainer.args.world_size,
        "device": trainer.args.device.type,
        "stage": stage,
        "offload": engine.zero_offload_optimizer().device if stage and engine.zero_offload_optimizer() else None,
        "mesh": list(weight.device_mesh.mesh.shape) if isinstance(weight, DTensor) else None,
        "held": (weight.to_local() if isinstance(weight, DTensor) else getattr(weight, "ds_tensor", weight)).numel(),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }
    (folder / f"rank_{trainer.args.process_index}.json").write_text(json.dumps(seen))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "force_fsdp" in sys.argv[3:])
