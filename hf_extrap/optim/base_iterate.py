"""x, kept bit for bit while the parameters hold y."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .displacement import copy_


class BaseIterate:
    """A copy of the parameters that are away from x, and the way back.

    Attributes:
        moved: indices of the parameters that hold y now.
        at: whose y they hold; None at rest.
        kept: x by index, as of the last `keep`.
    """

    def __init__(self) -> None:
        self.moved: list[int] = []
        self.at: int | None = None
        self.kept: dict[int, Tensor] = {}

    def keep(self, params: Sequence[Tensor], indices: Iterable[int]) -> None:
        """Copy these parameters, which are at rest."""
        indices = list(indices)
        for i in indices:
            if i not in self.kept or self.kept[i].shape != params[i].shape or self.kept[i].dtype != params[i].dtype:
                self.kept[i] = torch.empty_like(params[i])
        copy_([self.kept[i] for i in indices], [params[i] for i in indices])

    def leave(self, params: Sequence[Tensor], indices: list[int], at: int) -> None:
        """Copy these parameters, which are at rest, and note that they are about to hold the y of worker `at`."""
        self.keep(params, indices)
        self.moved, self.at = indices, at
        # Within one autocast context a second forward pass would take the casts of the first one's weights.
        torch.clear_autocast_cache()

    def restore(self, params: Sequence[Tensor]) -> None:
        """Put x back, bit for bit; nothing happens at rest."""
        if self.moved:
            torch.clear_autocast_cache()
        copy_([params[i] for i in self.moved], [self.kept[i] for i in self.moved])
        self.moved, self.at = [], None
