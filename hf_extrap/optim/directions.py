"""Directions that are drawn or looked back at, and seeds that depend on nothing but where they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .shards import held

Draw = Callable[[Tensor, torch.Generator], Tensor]


def gaussian(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """I.i.d. N(0, 1), float32, of the shape of `tensor` (Wen et al. 2018)."""
    return torch.randn(tensor.shape, generator=generator, device=tensor.device)


def uniform(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """I.i.d. U(−1, 1), float32, of the shape of `tensor` (SmoothOut)."""
    return torch.rand(tensor.shape, generator=generator, device=tensor.device).mul_(2).sub_(1)


NOISE: dict[str, Draw] = {"gaussian": gaussian, "uniform": uniform}


def noise(kind: str, params: Sequence[Tensor], *, seed: int, step: int, worker: int) -> list[Tensor]:
    """One draw a parameter, the same whenever it is asked for: there is no generator state to save.

    Args:
        kind: a name in `NOISE`.
        params: what to draw for.
        seed: the configuration's.
        step: counted from 0.
        worker: the number of the worker among all of them; the same number everywhere for shared noise.

    Returns:
        Tensors of the parameters' shapes and devices, float32. Of a sharded parameter each process draws the whole and
        keeps its part, so that noise does not depend on the engine.
    """
    draw = NOISE[kind]
    drawn = [draw(p, generator_for(p.device, kind, seed, step, worker, i)) for i, p in enumerate(params)]
    return [_part_of(whole, p) if isinstance(p, DTensor) else whole for whole, p in zip(drawn, params, strict=True)]


def _part_of(whole: Tensor, param: DTensor) -> Tensor:
    """The part that this process holds of `param`, of a tensor that every process has whole."""
    return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)


def generator_for(device: torch.device, *key: object) -> torch.Generator:
    """A generator seeded by `key` alone, alike in every process and on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def differences(before: Mapping[int, Tensor], params: Sequence[Tensor]) -> dict[int, Tensor]:
    """x_{t−1} − x_t by the index of the parameter, in at least float32: written over x_{t−1} where its type allows it.

    Args:
        before: x_{t−1} by index.
        params: x_t.
    """
    wide = [x if x.dtype in (torch.float32, torch.float64) else x.float() for x in before.values()]
    if wide:
        now = [held(params[i]) for i in before]
        same = [p if p.dtype == x.dtype else p.to(x.dtype) for p, x in zip(now, wide, strict=True)]
        torch._foreach_sub_([held(x) for x in wide], same)
    return dict(zip(before, wide, strict=True))


def last_update(
    groups: Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]],
    stepped: Sequence[bool],
    difference: Mapping[int, Tensor],
    learning_rate: Callable[[Mapping[str, Any]], float],
) -> list[Tensor | None]:
    """(x_{t−1} − x_t) / lr, the base optimizer's own direction, written over the difference; None for what was not
    stepped.

    Args:
        groups: options of the optimizer, and the parameters stepped with them.
        stepped: whether each parameter was.
        difference: x_{t−1} − x_t by the index of the parameter among all groups.
        learning_rate: of a group, from its options.
    """
    update: list[Tensor | None] = []
    for options, params in groups:
        rate = learning_rate(options)
        for _ in params:
            change = difference.get(len(update))
            keeps = change is not None and stepped[len(update)] and rate != 0
            update.append(change.div_(rate) if keeps and change is not None else None)
    return update
