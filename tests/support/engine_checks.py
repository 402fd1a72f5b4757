"""Runs of the engine tests beyond equality: resumes, exports, bfloat16, float16, overflows, offload, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from tests.support.engine_builders import build, zero
from tests.support.engine_problem import SCHEMES, STEPS, Cell, Engine, batch, loss_of, same, train

BF16: dict[str, dict[str, Any]] = {
    "FP16_UnfusedOptimizer": {"stage": 0},
    "DeepSpeedZeroOptimizer": {"stage": 1},
    "DeepSpeedZeroOptimizer, stage 2": {"stage": 2},
    "BF16_Optimizer": {"stage": 1, "data_types": {"grad_accum_dtype": "fp32"}},
    "DeepSpeedZeroOptimizer_Stage3": {"stage": 3},
}
"""What DeepSpeed steps bfloat16 weights with, and the settings that choose it."""
CONFIGURATIONS = Path(__file__).parents[2] / "configs" / "deepspeed"
SHORT = range(8)
SHORT_STEPS = 12
GLOBAL = [Cell(scheme) for scheme in ("none", "extragradient", "optimistic", "past-update")]
FP16 = {1: [*GLOBAL, Cell("extrap"), Cell("extrap-past")], 3: GLOBAL}
"""By stage. The steps of `extrap` and `extrap-past` are in units of the gradient, where a loss scale would show."""
POWERS = (8, 24)
"""Initial loss scales, as powers of two; the second overflows until it has been halved often enough."""


def mine(cell: Cell) -> list[int]:
    return [v * dist.get_world_size() + dist.get_rank() for v in range(cell.workers)]


def exports(name: str, folder: Path) -> dict[str, Any]:
    """Which exports hold x, to the bit, when asked for between steps and in the middle of one."""
    cell = Cell("optimistic", workers=2)
    engine = build(name, cell)
    train(engine, cell, mine(cell), SHORT)
    x, held = engine.weights(), {}
    for when in ("between steps", "in a step"):
        if when == "in a step":
            engine.optimizer.train(worker=0)
            held["moved"] = not same(engine.weights(), x)
        held |= {f"{kind} {when}": same(saved, x) for kind, saved in saved_weights(name, engine, folder / when)}
        held[f"model {when}"] = same(engine.weights(), x)
    return held


def saved_weights(name: str, engine: Engine, folder: Path) -> list[tuple[str, list[Tensor]]]:
    """The weights that each kind of export holds."""
    if name == "fsdp2":
        engine.optimizer.restore()
        whole = get_model_state_dict(engine.model, options=StateDictOptions(full_state_dict=True))
        return [("state dict", list(whole.values()))] if dist.get_rank() == 0 else []
    engine.model.save_checkpoint(folder, tag="saved")
    engine.optimizer.train(worker=0)
    engine.model.save_16bit_model(folder, "model.bin")
    dist.barrier()
    found = [("16-bit model", list(torch.load(folder / "model.bin", weights_only=True).values()))]
    if name != "zero0":
        states = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="saved")
        found.append(("zero_to_fp32", [states[key] for key in ("0.weight", "0.bias", "2.weight", "2.bias")]))
    else:
        file = torch.load(folder / "saved" / "mp_rank_00_model_states.pt", weights_only=False)
        found.append(("checkpoint", list(file["module"].values())))
    return found


def in_bfloat16(kind: str) -> dict[str, Any]:
    """Local and global directions with DeepSpeed's masters in float32."""
    fields = dict(BF16[kind])
    stage = fields.pop("stage")
    seen: dict[str, Any] = {}
    for scheme in ("extrap-past", "extragradient", "optimistic"):
        if stage == 3 and SCHEMES[scheme].is_local:
            continue
        cell = Cell(scheme, "adamw", workers=2, clipped=True)
        engine = zero(stage, cell, {"bf16": {"enabled": True}, **fields})
        run = train(engine, cell, mine(cell), (t % 6 for t in range(18)))
        seen[scheme] = {
            "losses": run.losses,
            "displacement": run.displacement,
            "holds": run.restores_x and run.holds_masters,
            "optimizer": engine.facts["optimizer"],
            "types": [str(p.dtype) for p in engine.weights()],
            "has_masters": engine.masters is not None,
            "steps": engine.optimizer.step_count,
        }
    return seen


def allow_float16() -> None:
    """DeepSpeed's CPU accelerator refuses float16; gloo and the CPU compute it."""
    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]


def in_float16(stage: int, cell: Cell, power: int) -> dict[str, Any]:
    """With an initial loss scale of 2^power: the weights at the end, the steps taken and skipped."""
    engine = zero(stage, cell, {"fp16": {"enabled": True, "initial_scale_power": power, "hysteresis": 1}})
    end = train(engine, cell, mine(cell), range(SHORT_STEPS)).end
    assert all(p.dtype == torch.float16 for p in end)
    return {"end": end, "steps": engine.optimizer.step_count, "skipped": engine.optimizer.skipped_steps}


def overflow(name: str) -> dict[str, Any]:
    """A step whose gradient is infinite in one process; the next ones start from x."""
    cell = Cell("optimistic")
    engine = build(name, cell)
    optimizer = engine.optimizer
    train(engine, cell, mine(cell), SHORT)
    x = engine.weights()
    optimizer.train()
    moved = not same(engine.weights(), x)
    inputs, labels = batch(99, mine(cell)[0], 0)
    loss = loss_of(engine.model, inputs, labels)
    engine.backward(loss * (float("inf") if dist.get_rank() == 1 else 1.0))
    if engine.step is not None:
        engine.step()
    else:
        optimizer.step()
        optimizer.zero_grad()
    seen = {
        "moved": moved,
        "kept": same(engine.weights(), x),
        "skipped": optimizer.skipped_steps,
        "counted": getattr(engine.model, "skipped_steps", None),
        "steps": optimizer.step_count,
        "directions": len(optimizer.local_state_dict()["directions"]),
    }
    run = train(engine, cell, mine(cell), range(100, 103))
    return {**seen, "after": run.losses, "finite": all(bool(p.isfinite().all()) for p in run.end)}


def offloaded(stage: int) -> dict[str, Any]:
    """The same cell with and without the optimizer's state in host memory, with the configuration that is shipped."""
    cell = Cell("optimistic", "adamw", workers=2, clipped=True)
    shipped = json.loads((CONFIGURATIONS / f"zero{stage}_offload.json").read_text(encoding="utf-8"))
    # What is "auto" is for the Trainer to fill in.
    fields = {name: value for name, value in shipped.items() if name[:4] == "zero"}
    plain, offload = zero(stage, cell, {}), zero(stage, cell, fields)
    ends = [train(engine, cell, mine(cell), SHORT).end for engine in (plain, offload)]
    return {"ends": ends, "offloads": bool(offload.model.zero_cpu_offload())}


def missing_connect(name: str) -> str:
    """The error of a loop without `connect`."""
    engine = build(name, Cell("optimistic"), connected=False)
    return told(lambda: train(engine, Cell("optimistic"), mine(Cell("optimistic")), SHORT))


def told(what: Callable[[], Any]) -> str:
    try:
        what()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


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
    of_rank = mine(cell)
    engine = build(name, cell)
    train(engine, cell, of_rank, range(SAVED_AFTER))
    save(engine, folder)
    unbroken = train(engine, cell, of_rank, range(SAVED_AFTER, STEPS))
    again = build(name, cell)
    load(again, folder)
    resumed = train(again, cell, of_rank, range(SAVED_AFTER, STEPS))
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
