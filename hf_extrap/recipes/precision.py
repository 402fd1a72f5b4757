"""bfloat16 on a CPU: some have instructions for it, as with AVX-512 or AMX, and others emulate it."""

from __future__ import annotations

import torch

NO_BF16 = "has no instructions for bf16, which is then several times slower than float32"
"""What is said of a CPU without."""


def cpu_has_bf16() -> bool:
    """Whether PyTorch computes in bfloat16 on this CPU with its oneDNN, and instructions that the CPU has for it."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
