"""What Extrapolated saves beside its base optimizer: tensors, numbers and names, nothing that needs pickle."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .processes import rank_and_world_size

if TYPE_CHECKING:
    from .extrapolated import Extrapolated

logger = logging.getLogger(__name__)


def shared_state(optimizer: Extrapolated) -> dict[str, Any]:
    """What is the same in every process, and the directions too where they are or where there is one process."""
    return {
        "step_count": optimizer.step_count,
        "skipped_steps": optimizer.skipped_steps,
        "peak_lr": list(optimizer._sizes.peak_lr),
        "last_step": optimizer._last_step,
        "local": local_state(optimizer) if not optimizer.config.is_local or rank_and_world_size()[1] == 1 else None,
    }


def load_shared_state(optimizer: Extrapolated, state: dict[str, Any]) -> None:
    """The inverse of `shared_state`; an empty one, of a base optimizer that ran alone, starts cold."""
    optimizer.step_count = int(state.get("step_count", 0))
    optimizer.skipped_steps = int(state.get("skipped_steps", 0))
    optimizer._sizes.peak_lr = [float(rate) for rate in state.get("peak_lr", [])]
    optimizer._last_step = state.get("last_step")
    optimizer._memory.directions = {}
    optimizer._sizes.curvature = {}
    optimizer._cold_after_load = optimizer.config.is_past
    if state.get("local") is not None:
        load_local_state(optimizer, state["local"])


def local_state(optimizer: Extrapolated) -> dict[str, Any]:
    """The directions of this process's workers, by `worker.parameter`, and whose they are."""
    return {
        "owner": _owner(optimizer),
        "directions": {
            f"{key}.{i}": d
            for key, buffers in optimizer._memory.directions.items()
            for i, d in enumerate(buffers)
            if d is not None
        },
        "curvature": {str(key): value for key, value in optimizer._sizes.curvature.items()},
    }


def load_local_state(optimizer: Extrapolated, state: dict[str, Any]) -> None:
    """The inverse of `local_state`; another owner's is left out, with a warning."""
    owner = _owner(optimizer)
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
        if index >= len(params) or saved.shape != params[index].shape:
            raise ValueError(
                f"the saved direction of parameter {index} has shape {tuple(saved.shape)}, which no parameter of this "
                "optimizer has in that place: the checkpoint belongs to another model."
            )
        directions.setdefault(key, [None] * len(params))[index] = saved.detach().to(params[index].device, copy=True)
    optimizer._memory.directions = directions
    device = params[0].device
    optimizer._sizes.curvature = {
        int(key): torch.as_tensor(v).to(device, copy=True) for key, v in state["curvature"].items()
    }
    optimizer._cold_after_load = False


def _owner(optimizer: Extrapolated) -> dict[str, Any]:
    """Who can use these directions: global ones fit any number of workers."""
    owner: dict[str, Any] = {"direction": optimizer.config.direction, "scope": optimizer.config.scope}
    if optimizer.config.is_local:
        rank, world_size = rank_and_world_size()
        owner |= {"world_size": world_size, "virtual_workers": optimizer.virtual_workers, "rank": rank}
    return owner
