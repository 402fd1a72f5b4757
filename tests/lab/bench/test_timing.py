"""Ratios and intervals of samples whose answer is known, and the peak memory of allocations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_extrap.lab.bench.timing import FEWEST, WARM_UPS, interleaved, peak_bytes, ratio, spread

CPU = torch.device("cpu")
MEGABYTE = 1 << 20


def test_rounds_ticks_and_blocks() -> None:
    ticks: list[int] = []
    values = iter(range(100))
    found = interleaved({"a": lambda: float(next(values))}, rounds=2, tick=lambda: ticks.append(1))
    assert len(ticks) == WARM_UPS + 2
    assert found["a"]["optimizer"] == [WARM_UPS, WARM_UPS + 1]
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) or 0.0 for name in "ab"}
    interleaved(steps, rounds=4)
    assert "".join(order)[2 * WARM_UPS :] in ("abbaabba", "baabbaab")
    values = iter([0.0] * 5 * WARM_UPS + [5.0, 1.0, 2.0, 90.0, 3.0, *[7.0] * 5])
    found = interleaved({"a": lambda: next(values)}, rounds=2, block=5)
    assert found["a"]["optimizer"] == [3.0, 7.0] and len(found["a"]["step"]) == 2
    assert next(values, None) is None


@pytest.mark.parametrize(("rounds", "fewest"), [(2, 2), (9, FEWEST)])
def test_whole_rounds_are_kept_if_they_are_enough(rounds: int, fewest: int) -> None:
    for whole in (fewest - 1, fewest, fewest + 1):
        blocks = iter([False] * (2 * (WARM_UPS + whole) + 1))
        found = interleaved({"a": lambda: 0.0, "b": lambda: 0.0}, rounds, over=lambda b=blocks: next(b, True))
        expected = [min(whole, rounds)] * 2 if whole >= fewest else []
        assert [len(row["step"]) for row in found.values()] == expected


def test_ratio_and_spread() -> None:
    # Rounds become slower by a factor of a hundred; each ratio is 1.5 all the same.
    base = np.geomspace(1, 100, 20)
    assert ratio(1.5 * base, base) == pytest.approx((1.5, 1.5, 1.5))
    ours, base = [1.0, 2.0, 4.0, 3.0], [1.0, 1.5, 2.0, 5.0]
    assert ratio(ours, base) == ratio(ours, base)
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0)
    generator = np.random.default_rng(3)
    holds, widths = 0, []
    for _ in range(200):
        middle, low, high = ratio(generator.normal(1.2, 0.1, 25), np.ones(25), draws=300)
        assert low <= middle <= high
        holds += low <= 1.2 <= high
        widths.append(high - low)
    # A normal sample's median has the standard error √(π/2) σ / √n; 95 % are 3.92 of it wide.
    assert np.mean(widths) == pytest.approx(3.92 * np.sqrt(np.pi / 2) * 0.1 / 5, rel=0.2)
    assert holds >= 180


def allocate(megabytes: int) -> torch.Tensor:
    return torch.empty(megabytes * MEGABYTE, dtype=torch.uint8)


def test_the_peak_excludes_earlier_and_freed_memory() -> None:
    before = allocate(16)
    assert peak_bytes(CPU, lambda: allocate(2)) == pytest.approx(2 * MEGABYTE, rel=0.01)
    assert before.numel() == 16 * MEGABYTE

    def work() -> Any:
        kept, passing = allocate(3), allocate(5)
        del passing
        return kept, allocate(4)

    assert peak_bytes(CPU, work) == pytest.approx(8 * MEGABYTE, rel=0.01)
