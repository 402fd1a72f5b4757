"""How many cases a randomized test draws: few by default, many with HF_EXTRAP_SOAK set."""

from __future__ import annotations

import os


def count(*, quick: int, soak: int) -> int:
    """Return `soak` if the environment variable HF_EXTRAP_SOAK is set, otherwise `quick`."""
    return soak if os.environ.get("HF_EXTRAP_SOAK") else quick
