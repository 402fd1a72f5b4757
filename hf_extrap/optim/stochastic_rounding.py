"""Rounding of float32 to bfloat16 whose expectation is exact."""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic_round(wide: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down with the probabilities that make the expectation exact.

    bfloat16 is the upper half of float32: random lower halves are added, and the lower half is cut off. Infinities and
    NaNs pass unchanged.
    """
    bits = wide.view(torch.int32)
    carry = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    rounded = bits.add(carry).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(wide), rounded, wide).to(torch.bfloat16)
