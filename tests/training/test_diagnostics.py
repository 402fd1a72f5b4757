"""The gradient noise scale against a distribution whose own is known."""

from __future__ import annotations

import math

import pytest
import torch

from hf_extrap.training.components.diagnostics import GradientNoiseScale


def test_it_finds_trace_over_squared_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, deviation, workers, small = torch.full((100,), 0.3), 2.0, 8, 16
    scale = GradientNoiseScale(smoothing=0.99)
    for _ in range(2000):
        noise = torch.randn(workers, 100, generator=generator) * deviation / math.sqrt(small)
        local = mean + noise
        square = local.mean(0).square().sum()
        scale.update(float(local.square().sum(1).mean()), float(square), small, workers * small)
    # tr(Σ) = 100 · 2², ‖G‖² = 100 · 0.3².
    assert scale.value == pytest.approx(4 / 0.09, rel=0.1)


def test_values_without_measurement_and_the_state() -> None:
    scale = GradientNoiseScale()
    assert math.isnan(scale.value)
    scale.update(1.0, 0.1, 1, 2)
    assert scale.value == math.inf
    scale, copy = GradientNoiseScale(), GradientNoiseScale()
    scale.update(2.0, 1.5, 4, 8)
    copy.load_state(scale.state())
    scale.update(2.0, 1.4, 4, 8)
    copy.update(2.0, 1.4, 4, 8)
    assert copy.value == scale.value
