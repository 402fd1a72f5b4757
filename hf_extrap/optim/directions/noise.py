"""I.i.d. noise, drawn anew for every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..buffers import Buffers
from ..random import generator_for
from .base import Direction

Draw = Callable[[Tensor, torch.Generator], Tensor]


class Noise(Direction):
    """Noise of each worker in local scope, shared noise in global scope; there is no state to save."""

    def of(self, worker: int, step: int) -> Buffers:
        """See `Direction.of`."""
        moves = [p.requires_grad for p in self._engine.leaves()]
        params = [p for p, moved in zip(self._engine.params(), moves, strict=True) if moved]
        number = self._engine.number_of(worker) if self.local else 0
        drawn = iter(noise(self._config.direction, params, seed=self._config.seed, step=step, worker=number))
        return [next(drawn) if moved else None for moved in moves]


def gaussian(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """I.i.d. N(0, 1), float32, of the shape of `tensor` (Wen et al. 2018)."""
    return torch.randn(tensor.shape, generator=generator, device=tensor.device)


def uniform(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """I.i.d. U(−1, 1), float32, of the shape of `tensor` (SmoothOut)."""
    return torch.rand(tensor.shape, generator=generator, device=tensor.device).mul_(2).sub_(1)


NOISE: dict[str, Draw] = {"gaussian": gaussian, "uniform": uniform}


def noise(kind: str, params: Sequence[Tensor], *, seed: int, step: int, worker: int) -> list[Tensor]:
    """One draw per parameter, the same for the same arguments.

    Args:
        kind: a name in `NOISE`.
        params: what to draw for.
        seed: of the configuration.
        step: counted from 0.
        worker: the number of the worker among those of all processes; the same number everywhere for shared noise.

    Returns:
        Tensors of the parameters' shapes and devices, float32. Of a sharded parameter each process draws the whole and
        keeps its local part, so that noise does not depend on the engine.
    """
    draw = NOISE[kind]
    drawn = [draw(p, generator_for(p.device, kind, seed, step, worker, i)) for i, p in enumerate(params)]
    return [_local_part(whole, p) if isinstance(p, DTensor) else whole for whole, p in zip(drawn, params, strict=True)]


def _local_part(whole: Tensor, param: DTensor) -> Tensor:
    """The local part of a tensor that every process has whole, sharded as `param` is."""
    return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
