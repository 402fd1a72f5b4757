"""Run by torchrun: two processes do the cells of `engine_problem`, one engine after the other.

torchrun ... engine_processes.py FOLDER few|all ENGINE...; process R leaves engines_R.pt in the folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.support import cpu_deepspeed  # noqa: F401

# isort: split
import deepspeed
import torch
import torch.distributed as dist

from tests.support.engine_builders import build
from tests.support.engine_exports import BF16, exports, forgotten_connect, in_bfloat16, offloaded, overflow
from tests.support.engine_problem import CELLS, Cell, train
from tests.support.engine_resume import RESUMED, resume
from tests.support.leaving import save_and_leave


def run_if_possible(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What this process saw, or why it was refused."""
    try:
        return what()
    except ValueError as error:
        return {"refused": str(error)}


def run(name: str, cell: Cell) -> dict[str, Any]:
    engine = build(name, cell)
    mine = [v * dist.get_world_size() + dist.get_rank() for v in range(cell.workers)]
    seen = train(engine, cell, mine)
    counted = {"steps": engine.optimizer.step_count, "skipped": engine.optimizer.skipped_steps}
    return {**asdict(seen), **engine.facts, **counted}


def beyond_equality(name: str, folder: Path) -> dict[str, Any]:
    """Resumes, exports, bfloat16, overflows, offload and refusals of one engine."""
    seen: dict[str, Any] = {}
    for number, cell in enumerate(RESUMED):
        (place := folder / f"{name}_{number}").mkdir(exist_ok=True)
        seen[f"resumed {cell}"] = run_if_possible(partial(resume, name, cell, place))
    seen["overflow"] = overflow(name)
    if name != "ddp":
        (place := folder / f"{name}_exports").mkdir(exist_ok=True)
        seen["exports"] = exports(name, place)
    if name not in ("ddp", "zero0"):
        seen["forgotten"] = forgotten_connect(name)
    stage = int(name[-1]) if name.startswith("zero") else None
    seen["bf16"] = {kind: in_bfloat16(kind) for kind, fields in BF16.items() if fields["stage"] == stage}
    if stage in (2, 3):
        seen["offload"] = offloaded(stage)
    return seen


def main(folder: Path, which: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    seen: dict[str, Any] = {}
    for name in names:
        started = time.perf_counter()
        seen[name] = {str(cell): run_if_possible(partial(run, name, cell)) for cell in CELLS[which]}
        if which == "few":
            seen[name] |= beyond_equality(name, folder)
        seen[name]["seconds"] = time.perf_counter() - started
    save_and_leave(seen, folder, "engines")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
