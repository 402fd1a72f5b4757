"""float16 under DeepSpeed: no loss scale leaks into a direction, and overflowing steps are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from hf_extrap import Extrapolated
from tests.distributed.fp16_processes import FITS, OVERFLOWS, PRESETS, STEPS, base, batch, config_of, make_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=PRESETS, ids="stage {}".format)
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, launch_here: Callable[..., Any]
) -> tuple[int, list[dict[str, Any]]]:
    """The stage, and what its two processes saw."""
    stage, folder = request.param, tmp_path_factory.mktemp("fp16")
    return stage, launch_here("fp16_processes.py", folder, str(stage), left=f"fp16_{stage}")


def alone(preset: str) -> Tensor:
    """The same in float32, by one process that plays both workers."""
    model, config = make_model(), config_of(preset)
    optimizer = Extrapolated(base(model), config, virtual_workers=2)

    def loss(step: int, worker: int) -> Tensor:
        inputs, labels = batch(step, worker)
        return nn.functional.cross_entropy(model(inputs), labels) / 2

    for step in range(STEPS):
        if not config.is_local and optimizer.wants_probe:
            with optimizer.probing() as backward:
                for worker in range(2):
                    backward(loss(step, worker))
        for worker in range(2):
            if optimizer.wants_probe:
                with optimizer.probing(worker=worker) as backward:
                    backward(loss(step, worker))
            optimizer.train(worker=worker)
            loss(step, worker).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_path_is_that_of_float32_to_rounding(seen: tuple[int, list[dict[str, Any]]]) -> None:
    stage, ranks = seen
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    for preset in PRESETS[stage]:
        weights, taken, skipped = ranks[0][f"{preset} {FITS}"]
        assert (taken, skipped) == (STEPS, 0), preset
        expected = alone(preset)
        assert (expected - start).abs().max() > 0.1
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-3, msg=lambda m, p=preset: f"{p}: {m}")


def test_overflowing_steps_are_skipped_and_counted(seen: tuple[int, list[dict[str, Any]]]) -> None:
    stage, ranks = seen
    for preset in PRESETS[stage]:
        weights, taken, skipped = ranks[0][f"{preset} {OVERFLOWS}"]
        assert skipped > 0 and taken > 0 and taken + skipped == STEPS, preset
        assert torch.isfinite(weights).all()
        assert torch.equal(weights, ranks[1][f"{preset} {OVERFLOWS}"][0])
