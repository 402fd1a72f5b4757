"""What Extrapolated saves beside its base optimizer: tensors, numbers and names, nothing that needs pickle."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .processes import rank_and_world_size
from .shards import held, like

if TYPE_CHECKING:
    from .extrapolated import Extrapolated

logger = logging.getLogger(__name__)


def shared_state(optimizer: Extrapolated) -> dict[str, Any]:
    """What is the same in every process, and the directions too where every process has the same."""
    return {
        **_progress(optimizer),
        "last_step": optimizer._last_step,
        "local": None if _is_own(optimizer) else _directions(optimizer),
    }


def load_shared_state(optimizer: Extrapolated, state: dict[str, Any]) -> None:
    """The inverse of `shared_state`; an empty one, of a base optimizer that ran alone, starts cold."""
    _load_progress(optimizer, state)
    optimizer._last_step = state.get("last_step")
    optimizer._memory.directions = {}
    optimizer._sizes.curvature = {}
    optimizer._cold_after_load = optimizer.config.is_past
    if state.get("local") is not None:
        _load_directions(optimizer, state["local"])


def local_state(optimizer: Extrapolated) -> dict[str, Any]:
    """All that one process needs, also where its engine saves nothing of this wrapper.

    Returns:
        `owner` and `progress`, which JSON can hold, and groups of named tensors: `directions` by `worker.parameter`
        (of a sharded parameter the part that this process holds), `curvature` by worker, and `last_step`.
    """
    last_step = optimizer._last_step
    return {
        **_directions(optimizer),
        "progress": _progress(optimizer),
        "last_step": {} if last_step is None else {"lengths": last_step},
    }


def load_local_state(optimizer: Extrapolated, state: dict[str, Any]) -> None:
    """The inverse of `local_state`; another owner's directions are left out, with a warning."""
    if "progress" in state:
        _load_progress(optimizer, state["progress"])
        lengths = state["last_step"].get("lengths")
        optimizer._last_step = None if lengths is None else lengths.to(optimizer._params()[0].device, copy=True)
    _load_directions(optimizer, state)


def _progress(optimizer: Extrapolated) -> dict[str, Any]:
    return {
        "step_count": optimizer.step_count,
        "skipped_steps": optimizer.skipped_steps,
        "peak_lr": list(optimizer._sizes.peak_lr),
    }


def _load_progress(optimizer: Extrapolated, state: dict[str, Any]) -> None:
    optimizer.step_count = int(state.get("step_count", 0))
    optimizer.skipped_steps = int(state.get("skipped_steps", 0))
    optimizer._sizes.peak_lr = [float(rate) for rate in state.get("peak_lr", [])]


def _directions(optimizer: Extrapolated) -> dict[str, Any]:
    return {
        "owner": _owner(optimizer),
        "directions": {
            f"{key}.{i}": held(d)
            for key, buffers in optimizer._memory.at_rest()
            for i, d in enumerate(buffers)
            if d is not None
        },
        "curvature": {str(key): value for key, value in optimizer._sizes.curvature.items()},
    }


def _load_directions(optimizer: Extrapolated, state: dict[str, Any]) -> None:
    owner = _owner(optimizer)
    optimizer._memory.directions, optimizer._sizes.curvature = {}, {}
    if state["owner"] != owner:
        differing = ", ".join(
            f"{name} was {state['owner'].get(name)!r} and is {value!r}"
            for name, value in owner.items()
            if state["owner"].get(name) != value
        )
        logger.warning("the saved directions belong to another run (%s): directions start cold", differing)
        optimizer._cold_after_load = False
        return
    params = optimizer._params()
    directions: dict[int, list[Tensor | None]] = {}
    for name, saved in state["directions"].items():
        key, index = (int(part) for part in name.split("."))
        if index >= len(params) or saved.shape != held(params[index]).shape:
            raise ValueError(
                f"the saved direction of parameter {index} has shape {tuple(saved.shape)}, which no parameter of this "
                "optimizer has in that place: the checkpoint belongs to another model."
            )
        direction = like(params[index], saved.detach().to(params[index].device, copy=True))
        directions.setdefault(key, [None] * len(params))[index] = direction
    optimizer._memory.directions = directions
    device = params[0].device
    optimizer._sizes.curvature = {
        int(key): torch.as_tensor(v).to(device, copy=True) for key, v in state["curvature"].items()
    }
    optimizer._cold_after_load = optimizer.config.is_past and not directions


def _is_own(optimizer: Extrapolated) -> bool:
    """Whether directions are each process's own."""
    return optimizer._engine.is_sharded or (optimizer.config.is_local and rank_and_world_size()[1] > 1)


def _owner(optimizer: Extrapolated) -> dict[str, Any]:
    """Who can use these directions: global ones of whole parameters fit any number of workers."""
    owner: dict[str, Any] = {"direction": optimizer.config.direction, "scope": optimizer.config.scope}
    if optimizer.config.is_local:
        owner["virtual_workers"] = optimizer.virtual_workers
    if optimizer._engine.is_sharded:
        owner["engine"] = optimizer._engine.name
    if optimizer.config.is_local or optimizer._engine.is_sharded:
        owner["rank"], owner["world_size"] = rank_and_world_size()
    return owner
