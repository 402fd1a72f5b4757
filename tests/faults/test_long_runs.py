"""A long run keeps its memory and its accuracy."""

from __future__ import annotations

import gc
import sys
import time
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import PRESETS, ExtrapConfig, Extrapolated
from hf_extrap.optim.directions.noise import noise
from hf_extrap.optim.reference import extrapolate
from tests.support.plain_loop import distance, make_batch, take_passes
from tests.support.soak import IS_SOAK, count

STEPS = count(400, 20_000)
TOLERANCE = 1e-9
"""Of x at the end against the textbook, in float64; the loss is strongly convex, so that rounding does not grow."""


def problem() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(5, 3).double()


def loss_of(model: nn.Module, step: int, point: list[Tensor] | None = None) -> Tensor:
    inputs, labels = make_batch(step % 64, 0)
    weight, bias = point or list(model.parameters())
    outputs = nn.functional.linear(inputs, weight, bias)
    return nn.functional.cross_entropy(outputs, labels) + 0.05 * (weight.square().sum() + bias.square().sum())


def sgd(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)


def tensors() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


QUICK = ("extrap", "extrap-past", "past-update", "gaussian")
"""The others run in the matrix and in the soak."""


@pytest.mark.parametrize(
    "preset",
    [pytest.param(p, marks=[] if p in QUICK or IS_SOAK else pytest.mark.matrix) for p in sorted(PRESETS)],
)
def test_memory_and_accuracy(preset: str) -> None:
    model, config = problem(), ExtrapConfig.preset(preset)
    params = list(model.parameters())
    optimizer = Extrapolated(sgd(params), config)
    tenth, seconds, held = STEPS // 10, [], []
    # What other tests have left is not counted, and need not be looked through.
    gc.collect()
    gc.freeze()
    for part in range(10):
        began = time.perf_counter()
        for step in range(part * tenth, (part + 1) * tenth):
            # As in a training loop, statistics are collected now and then.
            optimizer.collect_statistics = step % 10 == 0
            take_passes(optimizer, lambda *_, step=step: loss_of(model, step).backward())
            optimizer.step()
            optimizer.zero_grad()
        seconds.append((time.perf_counter() - began) / tenth)
        if part in (1, 9):
            gc.collect()
            held.append((tensors(), sys.getallocatedblocks()))
    (first, first_blocks), (last, last_blocks) = held
    textbook = extrapolate(
        list(problem().parameters()),
        [lambda point, step, probe: loss_of(model, step, point)],
        sgd,
        config,
        STEPS,
        noise=partial(drawn, config, params) if config.is_noise else None,
    )
    off = distance(params, textbook.x[-1])
    row = f"{preset:13} {STEPS:6} steps: {1e3 * seconds[1]:.2f} ms a step, later {1e3 * seconds[-1]:.2f} ms"
    print(f"{row}; {last - first:+} tensors, {last_blocks - first_blocks:+} blocks of memory; off by {off:.1e}")
    assert last == first
    # Python keeps some freed numbers, whatever the number of steps.
    assert last_blocks - first_blocks < 1000
    assert off < TOLERANCE
    assert optimizer.step_count == STEPS and optimizer.skipped_steps == 0


def drawn(config: ExtrapConfig, params: list[Tensor], step: int, worker: int) -> list[Tensor]:
    """The noise of the optimizer under test, for the textbook."""
    return [d.double() for d in noise(config.direction, params, seed=config.seed, step=step, worker=worker)]
