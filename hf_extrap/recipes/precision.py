"""bfloat16 on a CPU: native with AVX-512 or AMX instructions, otherwise emulated."""

from __future__ import annotations

import torch

#: Message for a CPU without the instructions.
NO_BF16 = "has no instructions for bf16, which is then several times slower than float32"


def cpu_has_bf16() -> bool:
    """Whether PyTorch has native bfloat16 on this CPU, by oneDNN and the CPU's instructions."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
