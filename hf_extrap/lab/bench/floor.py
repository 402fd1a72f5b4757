"""Memory traffic: how often a step must read or write a tensor as large as the parameters, and how often ours does."""

from __future__ import annotations

import time

import torch

from hf_extrap.optim.config import ExtrapConfig

from .timing import synchronize

BASES = {"sgd": 3, "nesterov": 5, "adamw": 7}
"""Reads and writes of a base optimizer's own step: x and the gradient read, x written, each state read and written."""


def floor_of(config: ExtrapConfig, workers: int = 1) -> float:
    """The least reads and writes of tensors as large as the parameters that the scheme adds to a step of the base.

    x and d are read and y written; a worker's own gradient is read and written, or the last update written. In local
    scope each worker moves, and keeps a gradient. A fused kernel of the base optimizer's step could also compute every
    norm. It cannot write the next y: the step size follows a learning rate that the schedule sets later, and the
    parameters hold x between steps.
    """
    if not config.moves:
        return 0
    moves = workers if config.is_local else 1
    if config.is_noise:
        return 2 * moves
    kept = 2 * moves if config.is_local else 0
    return 3 * moves + kept + (config.direction == "past_update")


def moved(config: ExtrapConfig, swap: bool = True, workers: int = 1) -> float:
    """The reads and writes that `Extrapolated` adds to a step of the base, without statistics.

    Args:
        config: the scheme, with a numeric step size, no preconditioner, and directions on the parameters' device.
        swap: whether parameters point to y (`ExtrapConfig.swap`); otherwise x is copied before and after.
        workers: number of virtual workers of this process.
    """
    if not config.moves:
        return 0
    moves = workers if config.is_local else 1
    # Noise is drawn into a separate tensor. A fresh global gradient is written by the backward pass.
    drawn = 1 if config.is_noise else 0
    norms = {"none": 0, "norm": 1, "step": 1, "layer_step": 1, "layer": 2, "filter": 5, "adaptive": 9}[config.scaling]
    step = 1.0 if config.check_finite else 0.0
    # A fresh direction is checked too.
    checked = 1 if config.check_finite and config.is_fresh else 0
    if config.direction == "past_update":
        # x is copied before the step, the new x subtracted, and the difference divided by the learning rate.
        step += 2 + 3 + 2
    elif config.scales_by_step or config.max_displacement is not None:
        step += 2 + 3 + 1
    captured = 2 if config.direction in ("gradient", "past_gradient") else 0
    there, back = drawn + norms + checked + 3 + (0 if swap else 2), 0 if swap else 2
    return (there + captured + back) * moves + step


def copy_bandwidth(device: torch.device, size: int = 1 << 28, rounds: int = 9) -> float:
    """Bytes per second, read and written, of the fastest of `rounds` copies of `size` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.numel() * 4 / min(seconds)
