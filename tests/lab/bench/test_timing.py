"""Ratios and intervals of samples whose answer is known, and the peak memory of each scheme in parameter sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_extrap.lab.bench.methods import make
from hf_extrap.lab.bench.timing import FEWEST, WARM_UPS, interleaved, peak_bytes, ratio, spread
from hf_extrap.lab.bench.workloads import Made, flat_list

CPU = torch.device("cpu")
MEGABYTE = 1 << 20
PARAMETERS = 10**6


def test_one_tick_a_round_and_no_sample_of_a_warm_up() -> None:
    ticks: list[int] = []
    values = iter(range(100))
    found = interleaved({"a": lambda: float(next(values))}, rounds=2, tick=lambda: ticks.append(1))
    assert len(ticks) == WARM_UPS + 2
    assert found["a"]["optimizer"] == [WARM_UPS, WARM_UPS + 1]


def test_rounds_are_interleaved_in_alternating_order() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) or 0.0 for name in "ab"}
    interleaved(steps, rounds=4)
    assert "".join(order)[2 * WARM_UPS :] in ("abbaabba", "baabbaab")


def test_a_sample_is_the_median_of_a_block() -> None:
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


def test_a_ratio_is_of_the_same_round() -> None:
    # Rounds become slower by a factor of a hundred; each ratio is 1.5 all the same.
    base = np.geomspace(1, 100, 20)
    assert ratio(1.5 * base, base) == pytest.approx((1.5, 1.5, 1.5))


def test_the_interval_is_that_of_the_median() -> None:
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


def test_an_interval_is_the_same_each_time() -> None:
    ours, base = [1.0, 2.0, 4.0, 3.0], [1.0, 1.5, 2.0, 5.0]
    assert ratio(ours, base) == ratio(ours, base)


def test_spread_is_median_and_quartiles() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0)


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
        step, optimizer = make(method, Made(flat_list(PARAMETERS, 100), CPU))
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
