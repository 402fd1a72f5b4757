"""The peak of memory, against allocations whose size is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_extrap.benchmarks.memory import peak_bytes
from hf_extrap.benchmarks.methods import make
from hf_extrap.benchmarks.workloads import Made, Workload, _flat

CPU = torch.device("cpu")
MEGABYTE = 1 << 20


def allocate(megabytes: float) -> torch.Tensor:
    return torch.empty(int(megabytes * MEGABYTE), dtype=torch.uint8)


def test_what_lives_at_once_is_summed_and_what_is_freed_is_not() -> None:
    def work() -> Any:
        kept = allocate(3)
        passing = allocate(5)
        del passing
        return kept, allocate(4)

    assert peak_bytes(CPU, work) == pytest.approx(8 * MEGABYTE, rel=0.01)


def test_what_was_there_before_is_not_counted() -> None:
    before = allocate(16)
    assert peak_bytes(CPU, lambda: allocate(2)) == pytest.approx(2 * MEGABYTE, rel=0.01)
    assert before.numel() == 16 * MEGABYTE


def peak_of(method: str, workload: Workload) -> float:
    def three_steps() -> Any:
        step, optimizer = make(method, Made(workload, CPU))
        for _ in range(3):
            step()
        return step, optimizer

    return peak_bytes(CPU, three_steps) / (4 * 10**6)


def test_adamw_holds_four_parameter_sizes_and_the_schemes_hold_what_they_say() -> None:
    workload = _flat(10**6, 10)
    base = peak_of("base", workload)
    assert base == pytest.approx(4, abs=0.15)
    assert peak_of("none", workload) == pytest.approx(base, abs=0.05)
    # The direction, and nothing as large beside it than one tensor's temporary.
    assert 0.9 < peak_of("extrap-past", workload) - base < 2.2
