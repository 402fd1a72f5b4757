"""What the logged gradient noise scale says about the batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def advice(row: Mapping[str, Any]) -> str | None:
    """One sentence on the batch size of a logged row; None if the row has no gradient noise scale.

    With a gradient noise scale N, training at a batch size B takes a number of steps proportional to 1 + N / B, and a
    number of samples proportional to 1 + B / N.

    Source: McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018, section 2.3.
    """
    noise, batch = row.get("extrap/gradient_noise_scale"), row.get("extrap/batch_size")
    if batch is None or "extrap/gradient_noise_scale" not in row:
        return None
    if noise is None or not math.isfinite(noise):
        return f"The gradient is mostly noise at a batch of {batch:,.0f}: a larger batch takes fewer steps."
    ratio = max(noise, 0.0) / batch
    steps, samples = (1 + ratio / 2) / (1 + ratio), (2 + ratio) / (1 + ratio)
    known = f"Gradient noise scale {noise:,.3g}, batch {batch:,.0f}"
    effect = f"twice the batch takes about {steps:.2f} times the steps and {samples:.2f} times the samples"
    verdict = "a larger batch pays" if ratio > 1 else "a larger batch saves few steps"
    return f"{known}: {verdict}, {effect}."
