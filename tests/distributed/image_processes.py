"""Run by torchrun: trains the toy ResNet with DistributedDataParallel; a process leaves images_R.pt in the folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.support.leaving import save_and_leave
from tests.support.tiny_images import buffers, train_images
from tests.support.tiny_trainer import weights

CELLS: dict[str, dict[str, Any]] = {
    f"{preset}, {count}": {"extrap": preset, "recalibrate_batch_norm": count}
    for preset in ("none", "extrap", "extrap-past")
    for count in (0, 2)
}
COMMON: dict[str, Any] = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}


def main(folder: Path) -> None:
    seen: dict[str, Any] = {}
    for name, fields in CELLS.items():
        trainer = train_images(folder / "out", **fields, **COMMON)
        assert trainer.args.world_size == 2
        seen[name] = {
            "weights": weights(trainer),
            "buffers": buffers(trainer.model),
            "losses": [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row],
        }
    save_and_leave(seen, folder, "images")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
