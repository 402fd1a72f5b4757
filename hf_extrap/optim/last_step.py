"""The last step of x: its difference and the length of each parameter's part."""

from __future__ import annotations

import torch
from torch import Tensor

from .buffers import BufferPool
from .engines.base import Engine
from .foreach import copy_, norms
from .sharding import held


class LastStep:
    """Compares x before and after the base optimizer's step.

    Args:
        engine: holds the parameters.
        pool: where memory comes from and goes to.

    Attributes:
        lengths: ‖Δx‖ of each parameter, 1-dim; None before the first step.
    """

    def __init__(self, engine: Engine, pool: BufferPool) -> None:
        self.lengths: Tensor | None = None
        self._engine = engine
        self._pool = pool
        self._before: dict[int, Tensor] = {}

    def keep_x(self) -> None:
        """Copy x, before the step."""
        params = self._engine.params()
        indices = [i for i, p in enumerate(self._engine.leaves()) if p.requires_grad]
        self._before = {i: self._pool.take(i, params[i]) for i in indices}
        copy_(list(self._before.values()), [params[i] for i in indices])

    def difference(self) -> dict[int, Tensor]:
        """x before the step minus x now, by the index of the parameter, in at least float32.

        Written over the copy of x where its dtype allows it.
        """
        params = self._engine.params()
        halves = (torch.bfloat16, torch.float16)
        wide = [x.float() if x.dtype in halves else x for x in self._before.values()]
        if wide:
            now = [held(params[i]) for i in self._before]
            same = [p if p.dtype == x.dtype else p.to(x.dtype) for p, x in zip(now, wide, strict=True)]
            torch._foreach_sub_([held(x) for x in wide], same)
        return dict(zip(self._before, wide, strict=True))

    def measure(self, difference: dict[int, Tensor]) -> Tensor:
        """Set `lengths`; returns the length over all parameters, 0-dim."""
        size = len(self._engine.params())
        if not difference:
            self.lengths = torch.zeros(size)
            return torch.zeros(())
        lengths = norms(list(difference.values()))
        if len(difference) < size:
            each = dict(zip(difference, lengths.unbind(), strict=True))
            nothing = lengths.new_zeros(())
            self.lengths = torch.stack([each.get(i, nothing) for i in range(size)])
        else:
            self.lengths = lengths
        return torch.linalg.vector_norm(lengths)

    def lengths_of(self, indices: list[int] | None) -> Tensor | None:
        """`lengths`, or those of some parameters alone; 0 for a parameter that was added after the step."""
        if self.lengths is None or indices is None:
            return self.lengths
        size = len(self._engine.params())
        lengths = torch.nn.functional.pad(self.lengths, (0, size - len(self.lengths)))
        if len(indices) == size:
            return lengths
        each = lengths.unbind()
        return torch.stack([each[i] for i in indices])

    def numbers(self) -> list[float] | None:
        """`lengths` as numbers, which state dicts can be compared by; exact."""
        return None if self.lengths is None else self.lengths.tolist()

    def load(self, numbers: list[float] | None) -> None:
        """The inverse of `numbers`."""
        params = self._engine.params()
        moved = [p.dtype for p, leaf in zip(params, self._engine.leaves(), strict=True) if leaf.requires_grad]
        wide = torch.float64 if torch.float64 in moved else torch.float32
        self.lengths = None if numbers is None else torch.tensor(numbers, dtype=wide, device=params[0].device)

    def release(self) -> None:
        """Free the copy of x."""
        for i, x in self._before.items():
            self._pool.give(i, x)
        self._before = {}

    def hand_over(self) -> None:
        """Forget the copy of x, whose memory the caller has taken as the difference."""
        self._before = {}
