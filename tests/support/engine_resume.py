"""What the engine tests save and load: one run without a break, and one that starts again from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.support.engine_builders import build
from tests.support.engine_problem import STEPS, Cell, Engine, train

SAVED_AFTER = 9
"""Past the start of every scheme, in the middle of a learning-rate schedule."""

RESUMED = [
    Cell("extrap-past, a layer's step", "adamw", workers=2),
    Cell("optimistic", "adamw", micro_batches=2, clipped=True),
    Cell("past-update", workers=2),
    Cell("optimistic, auto"),
]
"""Local and global directions, the curvature, and the length of the last step."""


def resume(name: str, cell: Cell, folder: Path) -> dict[str, Any]:
    """Whether a run that starts again from its checkpoint, built anew, ends where the unbroken one does, to the bit."""
    mine = [v * dist.get_world_size() + dist.get_rank() for v in range(cell.workers)]
    engine = build(name, cell)
    train(engine, cell, mine, range(SAVED_AFTER))
    save(engine, folder)
    unbroken = train(engine, cell, mine, range(SAVED_AFTER, STEPS))
    again = build(name, cell)
    load(again, folder)
    resumed = train(again, cell, mine, range(SAVED_AFTER, STEPS))
    state = again.optimizer.local_state_dict()
    is_own = "world_size" in state["owner"]
    again.optimizer.load_local_state_dict({**state, "owner": {**state["owner"], "world_size": 4}} if is_own else state)
    return {
        "is_own": is_own,
        "left of another world size": len(again.optimizer.local_state_dict()["directions"]) if is_own else 0,
        "losses": [unbroken.losses, resumed.losses],
        "ends": [unbroken.end, resumed.end],
        "steps": [engine.optimizer.step_count, again.optimizer.step_count],
        "peaks": [e.optimizer.local_state_dict()["progress"]["peak_lr"] for e in (engine, again)],
        "plain": all(type(t) is torch.Tensor for t in engine.optimizer.local_state_dict()["directions"].values()),
    }


def save(engine: Engine, folder: Path) -> None:
    """With the engine's own means, and a file a process."""
    if engine.step is not None:
        engine.model.save_checkpoint(folder, tag="saved")
    else:
        model, optimizer = get_state_dict(engine.model, engine.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        assert engine.scheduler is not None
        torch.save(engine.scheduler.state_dict(), folder / f"scheduler_{dist.get_rank()}.pt")
    torch.save(engine.optimizer.local_state_dict(), folder / f"extrap_{dist.get_rank()}.pt")
    dist.barrier()


def load(engine: Engine, folder: Path) -> None:
    """The inverse of `save`."""
    if engine.step is not None:
        path, _ = engine.model.load_checkpoint(folder, tag="saved")
        assert path is not None
    else:
        model, optimizer = get_state_dict(engine.model, engine.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(engine.model, engine.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        assert engine.scheduler is not None
        engine.scheduler.load_state_dict(torch.load(folder / f"scheduler_{dist.get_rank()}.pt", weights_only=True))
    state = torch.load(folder / f"extrap_{dist.get_rank()}.pt", weights_only=True)
    engine.optimizer.load_local_state_dict(state)
