"""Directions that are drawn, and seeds that depend on nothing but where they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
        Tensors of the parameters' shapes and devices, float32.
    """
    draw = NOISE[kind]
    return [draw(param, generator_for(param.device, kind, seed, step, worker, i)) for i, param in enumerate(params)]


def generator_for(device: torch.device, *key: object) -> torch.Generator:
    """A generator seeded by `key` alone, alike in every process and on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
