"""Parameters that point to y instead of being copied: the same numbers, less memory, and nobody who is left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_extrap.optim.buffers import owns_storage
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.kept_memory import kept_beside
from tests.support.plain_loop import (
    PRESETS,
    adamw,
    distance,
    identical,
    make_batch,
    make_model,
    run_plain_loop,
    sgd,
    values,
)

WORKERS = 3


def make(preset: str, swap: bool | None, workers: int = 1, **fields: object) -> tuple[nn.Module, Extrapolated]:
    model = make_model()
    config = ExtrapConfig.preset(preset, swap=swap, **fields)
    return model, Extrapolated(adamw(list(model.parameters())), config, virtual_workers=workers)


def backward(model: nn.Module, step: int) -> None:
    inputs, labels = make_batch(step, 0)
    nn.functional.cross_entropy(model(inputs), labels).backward()


@pytest.mark.parametrize("workers", [1, WORKERS])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_copy_gives_the_same_numbers(preset: str, workers: int) -> None:
    ends = []
    for swap in (True, False):
        model, optimizer = make(preset, swap, workers)
        run_plain_loop(model, optimizer, optimizer.config, range(workers), steps=5)
        ends.append(values(list(model.parameters())))
    assert identical(*ends)


@pytest.mark.parametrize("swap", [True, False])
def test_x_stays_in_its_memory(swap: bool) -> None:
    model, optimizer = make("extrap-past", swap)
    params = list(model.parameters())
    at_rest = [p.data_ptr() for p in params]
    run_plain_loop(model, optimizer, optimizer.config, range(1), steps=2)
    assert [p.data_ptr() for p in params] == at_rest
    x = values(params)
    optimizer.train()
    assert distance(x, params) > 1e-6
    assert all((p.data_ptr() == address) is not swap for p, address in zip(params, at_rest, strict=True))
    optimizer.restore()
    assert identical(x, params)
    assert [p.data_ptr() for p in params] == at_rest


@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "past-update", "extrap", "gaussian"])
@pytest.mark.parametrize("swap", [True, False])
def test_memory_does_not_grow(preset: str, swap: bool) -> None:
    model, optimizer = make(preset, swap, WORKERS)
    sizes = []
    for _ in range(4):
        run_plain_loop(model, optimizer, optimizer.config, range(WORKERS), steps=2)
        sizes.append(kept_beside(model, optimizer))
    assert sizes[1:] == sizes[:-1]
    # K directions and the memory that the next gradient takes; one for all otherwise, and a copy of x without swap.
    assert sizes[0] <= len(list(model.parameters())) * (WORKERS + 1 if preset == "extrap-past" else 1 + (not swap))


def test_a_direction_that_cannot_be_used_yet_is_not_kept() -> None:
    # No step has been taken whose share a move could be.
    model, optimizer = make("extrap", None, WORKERS)
    for worker in range(WORKERS):
        assert optimizer.wants_probe
        with optimizer.probing(worker=worker):
            backward(model, worker)
        for _ in range(2):
            optimizer.train(worker=worker)
        assert not optimizer.local_state_dict()["directions"]
        backward(model, worker)


@pytest.mark.parametrize("swap", [True, False])
def test_a_backward_pass_through_another_point_is_an_error(swap: bool) -> None:
    model, optimizer = make("extrap-past", swap)
    run_plain_loop(model, optimizer, optimizer.config, range(1), steps=2)
    inputs, labels = make_batch(2, 0)
    for away, back in ((optimizer.train, optimizer.restore), (optimizer.restore, optimizer.train)):
        back()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        away()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "past-update"])
@pytest.mark.parametrize("swap", [True, False])
def test_a_look_at_x_between_micro_batches_changes_nothing(preset: str, swap: bool) -> None:
    ends = []
    for looks in (False, True):
        model, optimizer = make(preset, swap)
        for step in range(4):
            for micro in range(2):
                optimizer.train()
                backward(model, 2 * step + micro)
                if looks:
                    optimizer.eval()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(values(list(model.parameters())))
    assert identical(*ends)


def test_a_look_at_the_next_y_spends_nothing() -> None:
    ends = []
    for looks in (False, True):
        model, optimizer = make("extrap-past", None)
        for step in range(4):
            if looks:
                x = values(list(model.parameters()))
                with optimizer.extrapolating():
                    assert step == 0 or distance(x, list(model.parameters())) > 1e-6
                assert identical(x, list(model.parameters()))
            optimizer.train()
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(values(list(model.parameters())))
    assert identical(*ends)


def test_a_state_saved_within_a_step_starts_cold(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make("extrap-past", True)
    run_plain_loop(model, optimizer, optimizer.config, range(1), steps=2)
    x = values(list(model.parameters()))
    optimizer.train()
    state = optimizer.state_dict()
    assert identical(x, list(model.parameters()))
    _, again = make("extrap-past", True)
    again.load_state_dict(state)
    again.train()
    assert again.step_count == 2
    assert "its first step does not extrapolate" in caplog.text


def test_parameters_that_share_memory_move_together() -> None:
    flat = torch.arange(1.0, 7.0)
    first, second, alone = (nn.Parameter(t) for t in (flat[:3], flat[3:], torch.ones(3)))
    twins = [nn.Parameter(twin) for twin in [torch.ones(3)] * 2]
    params = [first, second, alone, *twins]
    optimizer = Extrapolated(sgd(params), ExtrapConfig.preset("past-update"))
    for _ in range(2):
        optimizer.train()
        sum((p.square().sum() for p in params), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()
    address = alone.data_ptr()
    optimizer.train()
    assert alone.data_ptr() != address
    assert torch.equal(flat, torch.cat([first.detach(), second.detach()]))
    assert twins[0].data_ptr() == twins[1].data_ptr()


@pytest.mark.parametrize("alias", [lambda p: p.detach(), lambda p: p.data, lambda p: p.data.view(-1).view_as(p)])
@pytest.mark.parametrize("swap", [None, True, False])
def test_an_alias_of_a_parameter_in_the_forward_pass_sees_y(
    swap: bool | None, alias: Callable[[Tensor], Tensor]
) -> None:
    """The parameter is moved in place as long as an alias lives, and points to y again once it is gone."""
    model, optimizer = make("extrap-past", swap)
    weight, other = model[0].weight, model[2].weight
    for kept in (weight, other):
        aliases = alias(kept)
        run_plain_loop(model, optimizer, optimizer.config, range(1), steps=2)
        optimizer.train()
        y = values([kept])[0]
        assert torch.equal(aliases, kept) and aliases.data_ptr() == kept.data_ptr()
        optimizer.restore()
        assert torch.equal(aliases, kept) and not torch.equal(kept, y)
        del aliases
    address = weight.data_ptr()
    optimizer.train()
    assert (weight.data_ptr() == address) is (swap is False)


def test_who_owns_its_memory() -> None:
    whole, shared = torch.zeros(4, 2), torch.zeros(3).share_memory_()
    assert owns_storage(nn.Parameter(whole))
    assert owns_storage(nn.Parameter(whole.t()))
    tensors: list[Tensor] = [whole[:2], whole[2:], shared]
    assert not any(owns_storage(nn.Parameter(t)) for t in tensors)


def test_step_without_a_check_is_the_base_optimizers() -> None:
    for checks in (True, False):
        model, optimizer = make("extrap-past", None, check_finite=checks)
        optimizer.train()
        backward(model, 0)
        next(model.parameters()).grad.fill_(float("nan"))
        optimizer.step()
        assert optimizer.skipped_steps == int(checks)
        assert bool(torch.isfinite(next(model.parameters())).all()) is checks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which the host could wait for")
@pytest.mark.parametrize("preset", PRESETS)
def test_nobody_waits_for_the_device(preset: str) -> None:
    model = make_model(torch.float32).cuda()
    config = ExtrapConfig.preset(preset, check_finite=False)
    optimizer = Extrapolated(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), config)
    inputs, labels = (t.cuda() for t in make_batch(0, 0))
    for step in range(5):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            if optimizer.wants_probe:
                with optimizer.probing():
                    nn.functional.cross_entropy(model(inputs.float()), labels).backward()
            optimizer.train()
            nn.functional.cross_entropy(model(inputs.float()), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
