"""Every process gives the same answer about a damaged checkpoint, also where only one reads the damaged file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hf_extrap.training.checkpoints.finding import find_checkpoint
from hf_extrap.training.checkpoints.folders import MANIFEST_FILE
from tests.support.damage import DAMAGES, copy
from tests.support.soak import count
from tests.support.tiny_trainer import train

pytestmark = pytest.mark.distributed

ENGINES = ["ddp", "zero1", "fsdp2"][: count(quick=1, soak=3)]


def in_processes(folder: Path, engine: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"extrap": "optimistic", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    if engine != "ddp":
        from tests.support.trainer_engines import fsdp, zero

        fields |= fsdp() if engine == "fsdp2" else {"deepspeed": zero(engine)}
    train(folder / "whole", **fields)
    whole, run = folder / "whole", folder / "run"
    saved = whole / "checkpoint-4"
    names = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file())
    seen: dict[str, Any] = {"names": names, "answers": {}}
    for name in names:
        for damage in DAMAGES:
            if dist.get_rank() == 0:
                for step in (2, 4):
                    copy(whole / f"checkpoint-{step}", run / f"checkpoint-{step}")
                other = whole / "checkpoint-2" / name.replace("global_step4", "global_step2")
                DAMAGES[damage](run / "checkpoint-4" / name, other)
            dist.barrier()
            try:
                answer = f"taken: {find_checkpoint(run / 'checkpoint-4', run, 'strict')}"
            except ValueError as error:
                answer = str(error)
            newest = find_checkpoint(True, run, "strict")
            seen["answers"][name, damage] = answer, newest and newest.name
            dist.barrier()
    return seen


@pytest.mark.parametrize("engine", ENGINES)
def test_all_processes_refuse_it_with_the_same_words(
    engine: str, tmp_path: Path, run_processes: Callable[..., Any]
) -> None:
    first, second = run_processes(__name__, tmp_path, engine)
    assert first == second
    ranks = {name for name in first["names"] if "rank" in name or "rng_state_" in name}
    assert {"rng_state_0.pth", "rng_state_1.pth", "extrap_rank_0.safetensors", "extrap_rank_1.safetensors"} <= ranks
    for (name, damage), (answer, newest) in first["answers"].items():
        # Without a manifest, or with one that is a link, nothing is known to be wrong.
        if name == MANIFEST_FILE and damage in ("delete", "dangle", "make_folder", "leave"):
            continue
        assert "checkpoint-4 is damaged: " in answer and newest == "checkpoint-2", (name, damage, answer)
        assert name in answer or name == MANIFEST_FILE, (name, damage, answer)
    print(engine, len(first["names"]), "files,", len(first["answers"]), "damages")
