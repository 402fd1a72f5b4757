"""The part of `Extrapolated` that its saving, probing and engine steps use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from .buffers import Buffers
from .config import ExtrapConfig
from .engines import Engine
from .scheme import Scheme


class ExtrapolatedOptimizer(Protocol):
    """See `Extrapolated`."""

    base: Optimizer
    config: ExtrapConfig
    virtual_workers: int
    step_count: int
    skipped_steps: int
    skipped_in_a_row: int
    collect_statistics: bool
    is_resumed: bool
    engine: Engine
    scheme: Scheme

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    @property
    def wants_probe(self) -> bool: ...
    def probing(self) -> AbstractContextManager[Callable[[Tensor], None]]: ...
    def train(self, worker: int | None = None) -> None: ...
    def train_base(self) -> None: ...
    def restore(self, keep: bool = True) -> None: ...
    def observe(self) -> None: ...
    def keep_gradients(self, gradients: Buffers) -> None: ...
    def end_step(self, stepped: Sequence[bool]) -> None: ...
    def discard(self) -> None: ...
    def reset_step(self) -> None: ...
