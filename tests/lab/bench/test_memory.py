"""The peak of memory: what is not counted, and what a step of each scheme holds, in parameter sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_extrap.lab.bench.memory import peak_bytes
from hf_extrap.lab.bench.methods import make
from hf_extrap.lab.bench.workloads import Made, _flat

CPU = torch.device("cpu")
MEGABYTE = 1 << 20
PARAMETERS = 10**6


def allocate(megabytes: int) -> torch.Tensor:
    return torch.empty(megabytes * MEGABYTE, dtype=torch.uint8)


def test_what_was_there_before_is_not_counted() -> None:
    before = allocate(16)
    assert peak_bytes(CPU, lambda: allocate(2)) == pytest.approx(2 * MEGABYTE, rel=0.01)
    assert before.numel() == 16 * MEGABYTE


def test_what_is_freed_makes_room() -> None:
    def work() -> Any:
        kept, passing = allocate(3), allocate(5)
        del passing
        return kept, allocate(4)

    assert peak_bytes(CPU, work) == pytest.approx(8 * MEGABYTE, rel=0.01)


def peak_of(method: str) -> float:
    """In parameter sizes, with AdamW and given gradients."""

    def three_steps() -> Any:
        step, optimizer = make(method, Made(_flat(PARAMETERS, 100), CPU))
        for _ in range(3):
            step()
        return step, optimizer

    return peak_bytes(CPU, three_steps) / (4 * PARAMETERS)


@pytest.mark.parametrize(
    ("method", "most"),
    # AdamW has x, the gradient and two moments. Beside it at most x and d in local scope, and one of them in global.
    [("base", 4), ("none", 4), ("extrap-past", 6), ("extrap", 6), ("optimistic", 5), ("past-update", 5)],
)
def test_a_scheme_holds_no_more_than_it_needs(method: str, most: int) -> None:
    assert peak_of(method) < most + 0.05


def test_extrapolation_holds_more_than_the_base() -> None:
    # The bounds above could not fail if nothing were counted.
    assert peak_of("base") > 3.95 and peak_of("extrap-past") > 4.95
