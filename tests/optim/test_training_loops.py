"""The loops that people write: checkpoints, accelerate, learning-rate schedulers, clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim import lr_scheduler

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.reference import extrapolate
from tests.support.plain_loop import (
    CELLS,
    PRESETS,
    Cell,
    assert_same_run,
    distance,
    identical,
    loss_at,
    make_model,
    run_plain_loop,
    run_reference,
    run_virtual_workers,
    sgd,
    values,
    warm_up_and_decay,
    worker_losses,
)

# State dicts


@pytest.mark.parametrize("preset", PRESETS)
def test_the_state_dict_holds_tensors_and_numbers_only(preset: str, tmp_path: Path) -> None:
    model, config = make_model(), ExtrapConfig.preset(preset, max_displacement=0.5)
    optimizer = Extrapolated(sgd(list(model.parameters())), config, virtual_workers=2)
    run_plain_loop(model, optimizer, config, [0, 1], steps=3)
    torch.save([optimizer.state_dict(), optimizer.local_state_dict()], tmp_path / "state.pt")
    state, own = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state) == {"state", "param_groups", "extrap"}
    optimizer.load_state_dict(state_dict=state)
    optimizer.load_local_state_dict(own)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """One on the CPU; accelerate's state is global, and must not stay behind."""
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerate_keeps_the_momentum_and_the_direction(accelerator: Accelerator) -> None:
    """Its wrapper sends the state through `state_dict` and `load_state_dict` when it is made."""
    model, config = make_model(), ExtrapConfig.preset("extrap-past", step_ratio=0.5)
    optimizer = Extrapolated(sgd(list(model.parameters())), config)
    run_plain_loop(model, optimizer, config, [0], steps=3)
    momentum = values([state["momentum_buffer"] for state in optimizer.state.values()])
    prepared = accelerator.prepare_optimizer(optimizer)
    assert isinstance(prepared, AcceleratedOptimizer) and prepared.optimizer is optimizer
    assert identical([optimizer.state[p]["momentum_buffer"] for p in model.parameters()], momentum)
    for step in range(3, 6):
        prepared.train()
        loss_at(model, step).backward()
        prepared.step()
        prepared.zero_grad()
        prepared.eval()
    twin = make_model()
    twin_optimizer = Extrapolated(sgd(list(twin.parameters())), config)
    whole = run_plain_loop(twin, twin_optimizer, config, [0], steps=6)
    assert identical(list(model.parameters()), whole.x[-1])
    assert optimizer.step_count == 6


# Learning rates


@pytest.mark.parametrize(
    "make_scheduler",
    [
        warm_up_and_decay,
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.4, 0.2], total_steps=12),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.StepLR(o, 2, 0.1)], [3]
        ),
    ],
    ids=["lambda", "cosine", "one cycle", "sequential"],
)
@pytest.mark.parametrize("name", ["extrap", "extrap-annealed", "extrap-past-auto", "past-update", "sam"])
def test_schedulers_drive_the_base_and_the_step_size(name: str, make_scheduler: Callable[[Any], Any]) -> None:
    config = CELLS[name].config
    model = make_model()
    losses = worker_losses(model, config, 1)
    textbook = extrapolate(list(model.parameters()), losses, sgd, config, 9, schedule=make_scheduler)
    optimizer = Extrapolated(sgd(list(model.parameters())), config)
    run = run_plain_loop(model, optimizer, config, [0], scheduler=make_scheduler(optimizer))
    assert_same_run(run, textbook, 1e-11)


def test_an_annealed_step_size_follows_the_learning_rate_down() -> None:
    """Constant gradients: ‖x − y‖ is the step size, 0.2 of the way up, at the peak, and halfway down."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Extrapolated(torch.optim.SGD([w], lr=0.1), ExtrapConfig.preset("extrap", scaling="none", step_size=4.0))
    scheduler = lr_scheduler.LambdaLR(optimizer, [0.2, 1.0, 0.5, 0.0].__getitem__)
    moves = []
    for _ in range(3):
        with optimizer.probing():
            w.sum().backward()
        x = w.item()
        optimizer.train()
        moves.append(x - w.item())
        w.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert moves == pytest.approx([0.8, 4.0, 2.0], rel=1e-12)


class RateFree(torch.optim.SGD):
    """Keeps no learning rate in its groups, as an optimizer that finds its own would."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["lr"] = None


@pytest.mark.parametrize("fields", [{"step_ratio": 0.5}, {"step_size": "auto"}])
def test_a_ratio_of_no_learning_rate_is_refused(fields: dict[str, Any]) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"lr is None.*step_size"):
        optimizer = Extrapolated(RateFree(model.parameters()), ExtrapConfig.preset("extrap", **fields))
        with optimizer.probing():
            loss_at(model, 0).backward()
        optimizer.train()


def test_no_learning_rate_is_needed_for_a_number() -> None:
    model = make_model()
    optimizer = Extrapolated(RateFree(model.parameters()), ExtrapConfig.preset("sam", step_size=0.1))
    x = values(list(model.parameters()))
    with optimizer.probing():
        loss_at(model, 0).backward()
    optimizer.train()
    moved = sum(float(((a - b) ** 2).sum()) for a, b in zip(x, values(list(model.parameters())), strict=True)) ** 0.5
    assert moved == pytest.approx(0.1, rel=1e-6)


# Clipping


@pytest.mark.parametrize("name", ["extrap-past", "optimistic", "past-update"])
def test_past_directions_and_clipping(name: str) -> None:
    """The worker's own gradient is as it was; the averaged one, and the update, are what the base consumed."""
    model, config = make_model(), ExtrapConfig.preset(name, scaling="none", step_size=1.0, anneal=False)
    optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=0.1), config)
    params = list(model.parameters())
    optimizer.train()
    loss_at(model, 0).backward()
    raw = [p.grad.clone() for p in params]
    nn.utils.clip_grad_norm_(params, 0.01)
    clipped = [p.grad.clone() for p in params]
    optimizer.step()
    optimizer.zero_grad()
    x = values(params)
    optimizer.train()
    move = [a - b for a, b in zip(x, values(params), strict=True)]
    assert distance(move, raw if name == "extrap-past" else clipped) < 1e-12
    assert distance(raw, clipped) > 1e-3


CLIPPED = [("extrap", "auto"), ("extrap-past", "auto"), ("extragradient", "auto"), ("optimistic", "auto")]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("preset", "step_size"), CLIPPED)
def test_clipping_does_not_bend_the_measured_curvature(preset: str, step_size: str, workers: int) -> None:
    """L̂ compares two gradients of one batch: clip one of them alone and it measures the clipping."""
    cell = Cell(ExtrapConfig.preset(preset, step_size=step_size, probe_every=3), max_grad_norm=0.05)
    expected = run_reference(cell, "sgd", workers, torch.float64)
    assert_same_run(run_virtual_workers(cell, "sgd", workers, torch.float64), expected, 1e-11)


@pytest.mark.parametrize(("preset", "step_size"), CLIPPED)
def test_observing_before_clipping_measures_the_whole_gradient(preset: str, step_size: str) -> None:
    cell = Cell(ExtrapConfig.preset(preset, step_size=step_size, probe_every=3), max_grad_norm=0.05)
    model = make_model()
    optimizer = Extrapolated(sgd(list(model.parameters())), cell.config)
    scheduler = warm_up_and_decay(optimizer)
    expected = run_reference(cell, "sgd", 1, torch.float64)
    for step in range(9):
        if optimizer.wants_probe:
            with optimizer.probing():
                loss_at(model, step).backward()
        optimizer.train()
        assert distance(list(model.parameters()), expected.y[step][0]) < 1e-11
        loss_at(model, step).backward()
        optimizer.observe()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
