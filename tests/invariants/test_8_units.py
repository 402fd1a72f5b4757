"""Invariant 8: directions are in the units of the true mean gradient, unscaled and averaged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import (
    distance,
    identical,
    make_batch,
    make_model,
    run_plain_loop,
    sgd,
    take_passes,
    values,
)

SCHEMES = {
    **{name: ExtrapConfig.preset(name, scaling="none", step_size=0.5) for name in ("extrap", "extrap-past")},
    **{n: ExtrapConfig.preset(n, step_size=0.5) for n in ("extragradient", "optimistic", "past-update")},
    **{name: ExtrapConfig.preset(name) for name in ("sam", "asam", "msam")},
    "extrap-auto": ExtrapConfig.preset("extrap", scaling="none", step_size="auto"),
    "extrap-past-auto": ExtrapConfig.preset("extrap-past", scaling="none", step_size="auto", probe_every=2),
    "optimistic-auto": ExtrapConfig.preset("optimistic", step_size="auto", probe_every=2),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("workers", [2, 5])
def test_the_accumulation_count_has_no_influence(workers: int, name: str) -> None:
    """K workers that all see one batch are one worker."""
    config = SCHEMES[name]

    def alike(step: int, worker: int, probe: bool) -> tuple[Tensor, Tensor]:
        return make_batch(step, 0)

    runs = []
    for K in (1, workers):
        model = make_model()
        optimizer = Extrapolated(sgd(list(model.parameters())), config, virtual_workers=K)
        runs.append(run_plain_loop(model, optimizer, config, range(K), steps=6, batch=alike))
    for t in range(6):
        assert all(distance(y, runs[0].y[t][0]) < 1e-12 for y in runs[1].y[t])
    assert distance(runs[0].y[5][0], runs[0].x[5]) > 1e-3


def train_scaled(config: ExtrapConfig, scale: float | None, dtype: torch.dtype) -> list[list[Tensor]]:
    """Six points y of a loop with a gradient scaler of that scale, or with none."""
    model = make_model(dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=3, enabled=scale is not None)
    optimizer = Extrapolated(sgd(list(model.parameters())), config, grad_scaler=None if scale is None else scaler)
    ys = []
    for t in range(6):
        inputs, labels = make_batch(t, 0, dtype=dtype)
        take_passes(
            optimizer,
            lambda *_: scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward(),  # noqa: B023
            at_y=lambda _: ys.append(values(list(model.parameters()))),
        )
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    if scale is not None:
        assert scaler.get_scale() == 4 * scale  # the scale changes twice within the run
    return ys


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("scale", [2.0**16, 2.0**-8])
def test_the_loss_scale_has_no_influence(scale: float, name: str) -> None:
    plain = train_scaled(SCHEMES[name], None, torch.float32)
    scaled = train_scaled(SCHEMES[name], scale, torch.float32)
    assert max(distance(a, b) for a, b in zip(plain, scaled, strict=True)) < 1e-6


@pytest.mark.parametrize("preset", ["extrap", "extrap-past"])
def test_an_uneven_last_accumulation(preset: str) -> None:
    """Two micro-batches where four are usual, each divided by two: `loss_scale` says so, and the unit stays."""
    config = SCHEMES[preset]
    moves = []
    for count in (2, 4):
        model = make_model()
        optimizer = Extrapolated(sgd(list(model.parameters())), config, virtual_workers=4)
        assert optimizer.loss_scale == 0.25
        optimizer.loss_scale = 1 / count
        for t in range(2):
            for k in range(count):
                inputs, labels = make_batch(t, k % 2)
                if optimizer.wants_probe:
                    with optimizer.probing(worker=k):
                        (nn.functional.cross_entropy(model(inputs), labels) / count).backward()
                optimizer.train(worker=k)
                if (t, k) == (1, 0):
                    y = values(list(model.parameters()))
                    optimizer.eval()
                    moves.append([a - b for a, b in zip(y, values(list(model.parameters())), strict=True)])
                    optimizer.train(worker=k)
                (nn.functional.cross_entropy(model(inputs), labels) / count).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(*moves) < 1e-12
    assert max(float(v.abs().max()) for v in moves[0]) > 1e-3


def test_the_displacement_is_the_step_size_times_the_gradient() -> None:
    """By hand: two micro-batches of a linear model, their losses halved; d is the whole mean gradient of the first."""
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    config = ExtrapConfig.preset("extrap", scaling="none", step_size=0.25)
    optimizer = Extrapolated(torch.optim.SGD([w], lr=0.1), config, virtual_workers=2)
    with optimizer.probing(worker=0):
        ((w * torch.tensor([3.0, 4.0])).sum() / 2).backward()
    assert w.grad is None
    optimizer.train(worker=0)
    assert identical([w], [torch.tensor([0.25, 1.0], dtype=torch.float64)])
