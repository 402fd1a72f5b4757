"""What Extrapolated saves beside its base optimizer: tensors, numbers and names, nothing that needs pickle."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .distributed import rank_and_world_size
from .protocol import ExtrapolatedOptimizer
from .sharding import held

logger = logging.getLogger(__name__)


def whole_state(optimizer: ExtrapolatedOptimizer) -> dict[str, Any]:
    """The base optimizer's state dict, and under `extrap` what the wrapper adds: tensors and numbers only.

    Directions that differ between processes are not in it: each process saves its own `local_state_dict`.
    """
    optimizer.restore()
    return {**optimizer.base.state_dict(), "extrap": shared_state(optimizer)}


def load_whole_state(optimizer: ExtrapolatedOptimizer, state_dict: dict[str, Any]) -> None:
    """Load what `whole_state` returned, or the base optimizer's state alone, with which directions start cold.

    Raises:
        ValueError: for a state of another model or a malformed one, before anything is loaded.
    """
    added = state_dict.get("extrap", {})
    check_shared_state(optimizer, added)
    optimizer.restore()
    optimizer.reset_step()
    optimizer.base.load_state_dict({name: value for name, value in state_dict.items() if name != "extrap"})
    load_shared_state(optimizer, added)


def shared_state(optimizer: ExtrapolatedOptimizer) -> dict[str, Any]:
    """What is the same in every process; with the directions where every process has the same."""
    return {
        **_progress(optimizer),
        "last_step": optimizer.scheme.last_step.numbers(),
        "local": None if _is_own(optimizer) else _directions(optimizer),
    }


def check_shared_state(optimizer: ExtrapolatedOptimizer, state: Any) -> None:
    """Refuse what `shared_state` of this model cannot have returned; an empty state is a base optimizer's alone.

    Raises:
        ValueError: in one sentence that names the entry.
    """
    _check(isinstance(state, Mapping), "extrap", state, "a mapping")
    if not state:
        return
    _check_progress(state, "extrap.")
    last_step, local = state.get("last_step"), state.get("local")
    is_list = isinstance(last_step, list) and all(isinstance(length, float) for length in last_step)
    _check(last_step is None or is_list, "extrap.last_step", last_step, "a length for each parameter, or none")
    if local is not None:
        _check_directions(optimizer, local, "extrap.local")


def load_shared_state(optimizer: ExtrapolatedOptimizer, state: dict[str, Any]) -> None:
    """The inverse of `shared_state`; with an empty one directions start cold."""
    _load_progress(optimizer, state)
    optimizer.is_resumed, scheme = bool(state), optimizer.scheme
    scheme.last_step.load(state.get("last_step"))
    scheme.direction.start_cold(warn=True)
    scheme.step_size.curvature = {}
    if state.get("local") is not None:
        _load_directions(optimizer, state["local"])


def local_state_dict(optimizer: ExtrapolatedOptimizer) -> dict[str, Any]:
    """This process's own part, for `load_local_state_dict`: all that it needs, even if its engine saves nothing.

    Returns:
        `owner` and `progress`, which JSON can hold, and groups of named tensors: `directions` by `worker.parameter`
        (the local part of a sharded parameter), `curvature` by worker, and `last_step`.
    """
    lengths = optimizer.scheme.last_step.lengths
    return {
        **_directions(optimizer),
        "progress": _progress(optimizer),
        "last_step": {} if lengths is None else {"lengths": lengths},
    }


def load_local_state_dict(optimizer: ExtrapolatedOptimizer, state_dict: dict[str, Any]) -> None:
    """Load what `local_state_dict` returned.

    Directions of another scheme, world size or number of virtual workers are left out, with a warning, and start cold.
    """
    _check_directions(optimizer, state_dict, "the local state")
    if "progress" in state_dict:
        _check_progress(state_dict["progress"], "progress.")
        _load_progress(optimizer, state_dict["progress"])
        lengths = state_dict["last_step"].get("lengths")
        device = optimizer.engine.params()[0].device
        optimizer.scheme.last_step.lengths = None if lengths is None else lengths.to(device, copy=True)
    _load_directions(optimizer, state_dict)


def restored(optimizer: ExtrapolatedOptimizer) -> list[Tensor]:
    """Restore x; copies of it if the parameters held y, and nothing otherwise.

    Who copies or pickles a model before its optimizer, in the middle of a step, copies y.
    """
    is_moved = optimizer.scheme.displacement.worker is not None
    optimizer.restore()
    return [p.detach().clone() for p in _params(optimizer)] if is_moved else []


@torch.no_grad()
def put_back(optimizer: ExtrapolatedOptimizer, x: list[Tensor]) -> None:
    """Write what `restored` returned to the parameters of a copy."""
    for p, value in zip(_params(optimizer), x, strict=False):
        p.copy_(value)


def _params(optimizer: ExtrapolatedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _progress(optimizer: ExtrapolatedOptimizer) -> dict[str, Any]:
    return {
        "step_count": optimizer.step_count,
        "skipped_steps": optimizer.skipped_steps,
        "skipped_in_a_row": optimizer.skipped_in_a_row,
        "peak_lr": list(optimizer.scheme.step_size.peak_lr),
    }


def _load_progress(optimizer: ExtrapolatedOptimizer, state: dict[str, Any]) -> None:
    optimizer.step_count = int(state.get("step_count", 0))
    optimizer.skipped_steps = int(state.get("skipped_steps", 0))
    optimizer.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))
    optimizer.scheme.step_size.peak_lr = [float(rate) for rate in state.get("peak_lr", [])]


def _directions(optimizer: ExtrapolatedOptimizer) -> dict[str, Any]:
    scheme = optimizer.scheme
    return {
        "owner": _owner(optimizer),
        "directions": scheme.direction.store.state_dict(),
        "curvature": {str(worker): value for worker, value in scheme.step_size.curvature.items()},
    }


def _load_directions(optimizer: ExtrapolatedOptimizer, state: dict[str, Any]) -> None:
    owner, scheme = _owner(optimizer), optimizer.scheme
    scheme.step_size.curvature = {}
    if state["owner"] != owner:
        differing = ", ".join(
            f"{name} was {state['owner'].get(name)!r} and is {value!r}"
            for name, value in owner.items()
            if state["owner"].get(name) != value
        )
        logger.warning("the saved directions belong to another run (%s): directions start cold", differing)
        scheme.direction.start_cold(warn=False)
        return
    scheme.direction.start_cold(warn=not state["directions"])
    scheme.direction.store.load_state_dict(state["directions"], optimizer.engine.params())
    device = optimizer.engine.params()[0].device
    scheme.step_size.curvature = {
        int(worker): torch.as_tensor(value).to(device, copy=True) for worker, value in state["curvature"].items()
    }


def _is_own(optimizer: ExtrapolatedOptimizer) -> bool:
    """Whether directions are each process's own."""
    return optimizer.engine.is_sharded or (optimizer.config.is_local and rank_and_world_size()[1] > 1)


def _owner(optimizer: ExtrapolatedOptimizer) -> dict[str, Any]:
    """Which run can use these directions: global ones of whole parameters fit any number of workers."""
    owner: dict[str, Any] = {"direction": optimizer.config.direction, "scope": optimizer.config.scope}
    if optimizer.config.is_local:
        owner["virtual_workers"] = optimizer.virtual_workers
    if optimizer.engine.is_sharded:
        owner["engine"] = optimizer.engine.name
    if optimizer.config.is_local or optimizer.engine.is_sharded:
        owner["rank"], owner["world_size"] = rank_and_world_size()
    return owner


def _check(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} of the saved optimizer state is a {type(value).__name__}; allowed: {allowed}.")


def _check_progress(state: Any, where: str) -> None:
    _check(isinstance(state, Mapping), where.rstrip("."), state, "a mapping")
    for name in ("step_count", "skipped_steps", "skipped_in_a_row"):
        value = state.get(name, 0)
        _check(isinstance(value, int) and value >= 0, where + name, value, "a whole number >= 0")
    rates = state.get("peak_lr", [])
    is_list = isinstance(rates, (list, tuple)) and all(isinstance(rate, (int, float)) for rate in rates)
    _check(is_list, where + "peak_lr", rates, "a list of numbers")


def _check_directions(optimizer: ExtrapolatedOptimizer, state: Any, where: str) -> None:
    _check(isinstance(state, Mapping), where, state, "a mapping")
    for name in ("owner", "directions", "curvature"):
        _check(isinstance(state.get(name), Mapping), f"{where}.{name}", state.get(name), "a mapping")
    if state["owner"] != _owner(optimizer):
        # They will not be used.
        return
    params, workers = optimizer.engine.params(), optimizer.virtual_workers
    for name, saved in state["directions"].items():
        worker, _, index = str(name).partition(".")
        if not (worker.isdigit() and index.isdigit() and int(worker) < workers):
            raise ValueError(f"a saved direction is {name!r}; allowed: WORKER.PARAMETER, worker < {workers}.")
        shape = getattr(saved, "shape", None)
        if int(index) >= len(params) or shape != held(params[int(index)]).shape:
            raise ValueError(
                f"the saved direction of parameter {index} has shape {shape and tuple(shape)}, which no parameter of "
                "this optimizer has in that place: the checkpoint belongs to another model."
            )
    for worker, value in state["curvature"].items():
        is_number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
        _check(str(worker).isdigit() and is_number, f"{where}.curvature.{worker}", value, "a number of a worker")
