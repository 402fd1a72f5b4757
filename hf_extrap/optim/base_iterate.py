"""x, kept bit for bit while the parameters hold y."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .displacement import copy_
from .spares import Spares


class BaseIterate:
    """x of the parameters that are away from it, and the way back.

    A parameter goes away in one of two ways. Moved in place, its x is copied beforehand and copied back. Swapped, it
    points to other memory that holds y, and then to its own again, which nobody has touched: nothing is copied.

    Args:
        spares: where memory comes from and goes to.

    Attributes:
        moved: indices of the parameters that hold y now.
        at: whose y they hold; None at rest.
        kept: their x, by index.
    """

    def __init__(self, spares: Spares) -> None:
        self.moved: list[int] = []
        self.at: int | None = None
        self.kept: dict[int, Tensor] = {}
        self._spares = spares
        self._swapped: dict[int, Tensor] = {}
        self._away: dict[int, Tensor] = {}
        self._away_at: int | None = None
        self._away_swapped: set[int] = set()

    def keep(self, params: Sequence[Tensor], indices: Iterable[int]) -> None:
        """Copy x of parameters that are about to be moved in place."""
        indices = list(indices)
        for i in indices:
            self.kept[i] = self._spares.take(i, params[i])
        copy_([self.kept[i] for i in indices], [params[i] for i in indices])

    def leave(self, params: Sequence[Tensor], indices: list[int], at: int, swapped: Mapping[int, Tensor]) -> None:
        """Note that these parameters hold the y of worker `at`, once those in `swapped` point to theirs."""
        for i, y in swapped.items():
            self.kept[i] = params[i].data
            params[i].data = y
        self._swapped = dict(swapped)
        self.moved, self.at = indices, at
        self._has_moved(params, self._swapped)

    def restore(self, params: Sequence[Tensor], keep: bool = False) -> None:
        """Put x back, bit for bit; nothing happens at rest.

        Args:
            params: all parameters.
            keep: keep y for `come_back`, as long as the step lasts.
        """
        if not self.moved:
            self.at = None
            return
        if keep:
            self.forget()
            self._away_at, self._away_swapped = self.at, set(self._swapped)
            copied = [i for i in self.moved if i not in self._swapped]
            self._away = {i: self._spares.take(i, params[i]) for i in copied}
            copy_([self._away[i] for i in copied], [params[i] for i in copied])
            self._away |= self._swapped
        else:
            for i, y in self._swapped.items():
                self._spares.give(i, y)
        for i in self._swapped:
            params[i].data = self.kept.pop(i)
        copy_([params[i] for i in self.kept], list(self.kept.values()))
        for i, x in self.kept.items():
            self._spares.give(i, x)
        self._has_moved(params, self._swapped)
        self.moved, self.at, self.kept, self._swapped = [], None, {}, {}

    def come_back(self, params: Sequence[Tensor], at: int) -> bool:
        """Go from x to the y of worker `at` again, if it has been kept."""
        if self._away_at != at:
            return False
        points, self._away, self._away_at = self._away, {}, None
        copied = [i for i in points if i not in self._away_swapped]
        self.keep(params, copied)
        copy_([params[i] for i in copied], [points[i] for i in copied])
        for i in copied:
            self._spares.give(i, points[i])
        self.leave(params, list(points), at, {i: y for i, y in points.items() if i in self._away_swapped})
        return True

    def forget(self) -> None:
        """Nobody comes back to the y that was kept."""
        for i, y in self._away.items():
            self._spares.give(i, y)
        self._away, self._away_at = {}, None

    @staticmethod
    def _has_moved(params: Sequence[Tensor], swapped: Iterable[int]) -> None:
        # Within one autocast context a second forward pass would take the casts of the first one's weights.
        torch.clear_autocast_cache()
        # As for a move in place: a backward pass through what was computed before it is an error.
        increment_version([params[i] for i in swapped])
