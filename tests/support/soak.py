"""How many cases a test of faults runs: few by default, many where HF_EXTRAP_SOAK is set."""

from __future__ import annotations

import os


def count(*, quick: int, soak: int) -> int:
    """`soak` under `make soak`, else `quick`."""
    return soak if os.environ.get("HF_EXTRAP_SOAK") else quick
