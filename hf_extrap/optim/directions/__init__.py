"""Extrapolation directions: one object and one file each."""

from __future__ import annotations

from ..buffers import BufferStore
from ..config import ExtrapConfig
from ..engines.base import Engine
from .base import Direction
from .gradient import FreshGradient
from .noise import Noise
from .past_gradient import PastGradient
from .past_update import PastUpdate

DIRECTIONS: dict[str, type[Direction]] = {
    "none": Direction,
    "gradient": FreshGradient,
    "past_gradient": PastGradient,
    "past_update": PastUpdate,
    "gaussian": Noise,
    "uniform": Noise,
}
"""By the name in `ExtrapConfig.direction`."""


def make_direction(config: ExtrapConfig, engine: Engine, store: BufferStore) -> Direction:
    """The direction that a configuration asks for."""
    return DIRECTIONS[config.direction](config, engine, store)


__all__ = ["DIRECTIONS", "Direction", "make_direction"]
