"""Training loops: state dicts, accelerate, schedules, clipping, dropout masks, closures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.optim import lr_scheduler

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.reference import extrapolate
from tests.support.plain_loop import (
    BASES,
    CELLS,
    PRESETS,
    Cell,
    assert_same_run,
    distance,
    finishing,
    identical,
    loss_at,
    make_model,
    run_plain_loop,
    run_reference,
    run_steps,
    run_virtual_workers,
    sgd,
    take_passes,
    values,
    warm_up_and_decay,
    worker_losses,
)


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


def test_an_absolute_step_size_needs_no_learning_rate() -> None:
    model = make_model()
    optimizer = Extrapolated(RateFree(model.parameters()), ExtrapConfig.preset("sam", step_size=0.1))
    x = values(list(model.parameters()))
    with optimizer.probing():
        loss_at(model, 0).backward()
    optimizer.train()
    moved = sum(float(((a - b) ** 2).sum()) for a, b in zip(x, values(list(model.parameters())), strict=True)) ** 0.5
    assert moved == pytest.approx(0.1, rel=1e-6)


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


CLIPPED = ["extrap", "extrap-past", "extragradient", "optimistic"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("preset", CLIPPED)
def test_clipping_does_not_change_the_measured_curvature(preset: str, workers: int) -> None:
    """L̂ compares two gradients of one batch, neither of which is clipped: in `step`, and before in `observe`."""
    cell = Cell(ExtrapConfig.preset(preset, step_size="auto", probe_every=3), max_grad_norm=0.05)
    expected = run_reference(cell, "sgd", workers, torch.float64)
    assert_same_run(run_virtual_workers(cell, "sgd", workers, torch.float64), expected, 1e-11)
    model = make_model()
    params = list(model.parameters())
    optimizer = Extrapolated(sgd(params), cell.config, virtual_workers=workers)
    clip = finishing(optimizer, params, warm_up_and_decay(optimizer), cell.max_grad_norm)

    def finish() -> None:
        optimizer.observe()
        clip()

    def backward(step: int, worker: int, index: int, probe: object) -> None:
        (loss_at(model, step, worker) / workers).backward()

    assert_same_run(run_steps(params, optimizer, backward, finish), expected, 1e-11)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.dropout, self.last = nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3)
        self.masks: list[Tensor] = []
        self.dropout.register_forward_hook(lambda module, inputs, output: self.masks.append(output != 0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.dropout(self.first(inputs)))


@pytest.mark.parametrize("preset", ["extrap", "sam"])
def test_both_passes_see_the_same_masks(preset: str) -> None:
    model = Dropping()
    optimizer = Extrapolated(sgd(list(model.parameters())), ExtrapConfig.preset(preset), virtual_workers=2)
    torch.manual_seed(8)
    for step in range(2):
        take_passes(optimizer, lambda k, index, probe: (loss_at(model, step, k) / 2).backward())  # noqa: B023
        optimizer.step()
        optimizer.zero_grad()
    pairs = list(zip(model.masks[::2], model.masks[1::2], strict=True))
    assert all(torch.equal(probe, regular) for probe, regular in pairs)
    assert len({tuple(regular.flatten().tolist()) for _, regular in pairs}) == 4
    after = torch.rand(3)
    torch.manual_seed(8)
    for _ in range(4):
        nn.functional.dropout(torch.ones(7, 64), 0.5)
    assert torch.equal(after, torch.rand(3))


def test_global_probes_see_the_masks_of_their_batches() -> None:
    """All probes come first, then all regular passes: worker k's masks are the same in both."""
    model = Dropping()
    optimizer = Extrapolated(sgd(list(model.parameters())), ExtrapConfig.preset("extragradient"), virtual_workers=2)
    take_passes(optimizer, lambda k, index, probe: (loss_at(model, 0, k) / 2).backward())
    assert torch.equal(model.masks[0], model.masks[2]) and torch.equal(model.masks[1], model.masks[3])
    assert not torch.equal(model.masks[0], model.masks[1])


def test_independent_samples_have_masks_of_their_own() -> None:
    model = Dropping()
    optimizer = Extrapolated(sgd(list(model.parameters())), ExtrapConfig.preset("extrap", batch="independent"))
    take_passes(optimizer, lambda k, index, probe: loss_at(model, int(probe is not None)).backward())
    assert not torch.equal(*model.masks)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("preset", ["none", "extrap", "extrap-past", "past-update", "sam"])
def test_a_closure_gives_the_numbers_of_a_loop(preset: str, base: str) -> None:
    config = ExtrapConfig.preset(preset)
    plain = make_model()
    plain_optimizer = Extrapolated(BASES[base](list(plain.parameters())), config)
    expected = run_plain_loop(plain, plain_optimizer, config, [0], steps=4)
    model = make_model()
    optimizer = Extrapolated(BASES[base](list(model.parameters())), config)
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            return loss

        with torch.no_grad():
            at_y = copy.deepcopy(model)
            at_y.load_state_dict(dict(zip(model.state_dict(), expected.y[step][0], strict=True)))
        assert optimizer.step(closure).item() == loss_at(at_y, step).item()
        assert identical(list(model.parameters()), expected.x[step + 1])
    assert optimizer.skipped_steps == 0
