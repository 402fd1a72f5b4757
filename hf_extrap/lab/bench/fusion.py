"""Would one pass do? AdamW's step and the length of each tensor's move, compiled, beside what `Extrapolated` runs.

`python -m hf_extrap.lab.bench.fusion [PARAMETERS] [TENSORS]`; torch.compile needs a C++ compiler on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .timing import Step, interleaved, spread, synchronize

LEARNING_RATE, BETA1, BETA2, EPSILON, DECAY = 1e-3, 0.9, 0.999, 1e-8, 0.01


def fused(
    x: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor], bias1: Tensor, bias2: Tensor
) -> Tensor:
    """AdamW of tensors, and how far each has moved; every tensor is read and written once where a compiler fuses it."""
    lengths = []
    for p, g, m, v in zip(x, gradients, first, second, strict=True):
        mean, square = torch.lerp(m, g, 1 - BETA1), v * BETA2 + g * g * (1 - BETA2)
        stepped = p * (1 - LEARNING_RATE * DECAY) - LEARNING_RATE * (mean / bias1) / ((square / bias2).sqrt() + EPSILON)
        lengths.append((stepped - p).square().sum().sqrt())
        m.copy_(mean)
        v.copy_(square)
        p.copy_(stepped)
    return torch.stack(lengths)


def compare(parameters: int, tensors: int, device: torch.device, rounds: int = 20) -> dict[str, tuple[float, float]]:
    """Median seconds, and their spread, of the compiled pass, of the three passes, and of AdamW alone.

    Raises:
        RuntimeError: where the two ways differ by more than rounding.
    """
    torch.manual_seed(0)
    start = [torch.randn(parameters // tensors, device=device) for _ in range(tensors)]
    gradients = [torch.randn_like(t) for t in start]
    x, first, second = ([t.clone() for t in start], [torch.zeros_like(t) for t in start], [t * 0 for t in start])
    compiled = torch.compile(fused)
    count = torch.zeros((), device=device)

    def one_pass() -> Tensor:
        count.add_(1)
        return compiled(x, gradients, first, second, 1 - BETA1**count, 1 - BETA2**count)

    stepped: list[Tensor] = [torch.nn.Parameter(t.clone()) for t in start]
    for p, g in zip(stepped, gradients, strict=True):
        p.grad = g
    base = torch.optim.AdamW(
        stepped, lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=DECAY, fused=True
    )
    before = [torch.empty_like(t) for t in start]

    @torch.no_grad()
    def three_passes() -> Tensor:
        torch._foreach_copy_(before, stepped)
        base.step()
        torch._foreach_sub_(before, stepped)
        return torch.stack(torch._foreach_norm(before))

    for _ in range(3):
        torch.testing.assert_close(one_pass(), three_passes(), rtol=1e-4, atol=1e-7)
    found = interleaved(
        {name: _step(work, device) for name, work in (("one", one_pass), ("three", three_passes), ("base", base.step))},
        rounds,
    )
    return {name: spread(row["step"]) for name, row in found.items()}


def _step(work: Callable[[], object], device: torch.device) -> Step:
    def step() -> float:
        work()
        synchronize(device)
        return 0.0

    return step


if __name__ == "__main__":
    sizes = [int(float(word)) for word in sys.argv[1:]] or [20_000_000, 10]
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = {"one": "compiled, one pass", "three": "as Extrapolated does it", "base": "AdamW alone"}
    for name, (middle, width) in compare(sizes[0], sizes[1], place).items():
        print(f"{named[name]:24s} {1e3 * middle:8.2f} ms ({1e3 * width:.2f})")
