"""How many cases a test of faults runs: few in `make test`, many in `make soak`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

IS_SOAK = bool(os.environ.get("HF_EXTRAP_SOAK"))
"""Whether this is a soak."""


def count(quick: int, soak: int) -> int:
    """One of two numbers: `soak` if the environment variable HF_EXTRAP_SOAK is set."""
    return soak if IS_SOAK else quick


def cases(quick: int, soak: int, **options: int) -> settings:
    """Settings of a property test with so many cases; those of `quick` are the same in every run."""
    return settings(
        max_examples=count(quick, soak),
        report_multiple_bugs=False,
        derandomize=not IS_SOAK,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        **options,
    )
