"""Directions in the host's memory: the same numbers, and the same state dicts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.memory import DirectionMemory, HostStore

WORKERS = 3


def make(preset: str, device: str | None, **fields: Any) -> tuple[nn.Module, Extrapolated]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    config = ExtrapConfig.preset(preset, direction_device=device, **fields)
    return model, Extrapolated(torch.optim.AdamW(model.parameters(), lr=0.05), config, virtual_workers=WORKERS)


def train(model: nn.Module, optimizer: Extrapolated, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        for worker in range(WORKERS):
            torch.manual_seed(step * WORKERS + worker)
            batch = torch.randn(4, 5)
            if optimizer.wants_probe:
                with optimizer.probing(worker=worker):
                    loss(model, batch).backward()
            optimizer.train(worker=worker)
            loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch[:, :2]).square().mean() / WORKERS


CELLS: list[tuple[str, dict[str, Any]]] = [
    ("extrap", {}),
    ("extrap", {"step_size": "auto"}),
    ("extrap-past", {}),
    ("extrap-past", {"direction_dtype": "bfloat16"}),
    ("extrap-past", {"step_size": "auto", "probe_every": 2}),
    ("optimistic", {}),
    ("extragradient", {}),
    ("past-update", {}),
]


@pytest.mark.parametrize(("preset", "fields"), CELLS, ids=str)
def test_the_host_gives_the_same_numbers(preset: str, fields: dict[str, Any]) -> None:
    beside, host = make(preset, None, **fields), make(preset, "cpu", **fields)
    stock = make("none", None)
    for model, optimizer in (beside, host, stock):
        train(model, optimizer, 0, 6)
    assert isinstance(host[1]._memory.directions, HostStore)
    pairs = list(zip(beside[0].parameters(), host[0].parameters(), stock[0].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs), "nothing was extrapolated"


@pytest.mark.parametrize("saved_on", [None, "cpu"])
@pytest.mark.parametrize("loaded_on", [None, "cpu"])
def test_a_state_is_read_wherever_directions_live(saved_on: str | None, loaded_on: str | None) -> None:
    whole = make("extrap-past", None)
    train(*whole, 0, 7)
    model, optimizer = make("extrap-past", saved_on)
    train(model, optimizer, 0, 4)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert len(state["extrap"]["local"]["directions"]) == WORKERS * 4
    model, optimizer = make("extrap-past", loaded_on)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), model.parameters(), strict=True))


def test_a_step_that_is_not_finite_drops_what_the_host_holds() -> None:
    model, optimizer = make("extrap-past", "cpu")
    train(model, optimizer, 0, 2)
    assert len(optimizer._memory.directions) == WORKERS
    optimizer.train(worker=0)
    (model(torch.full((1, 5), torch.inf)) ** 2).sum().backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1 and len(optimizer._memory.directions) == 0


def test_one_worker_at_a_time_is_beside_the_parameters() -> None:
    memory = DirectionMemory(None, on_host=True)
    for worker in range(WORKERS):
        memory.store(worker, [torch.full((2,), float(worker)), None])
    store = memory.directions
    assert isinstance(store, HostStore)
    first = store[0]
    assert first[0] is not None and first[1] is None and first[0] is not dict(memory.at_rest())[0][0]
    store[0][0].add_(10)  # type: ignore[union-attr]
    assert [d[0].tolist() for _, d in memory.at_rest() if d[0] is not None] == [[10, 10], [1, 1], [2, 2]]
    assert store[1][0].tolist() == [1, 1]  # type: ignore[union-attr]


def test_gradients_of_passes_in_turn_add_up() -> None:
    memory = DirectionMemory(None, on_host=True)
    for worker in (0, 1, 0, 1):
        buffers, filled = memory.start_capture(worker, 1)
        if 0 in filled:
            buffers[0].add_(worker + 1)  # type: ignore[union-attr]
        else:
            buffers[0] = torch.full((3,), worker + 1.0)
            filled.add(0)
    memory.turn_captured_into_directions()
    assert [d[0].tolist() for _, d in memory.at_rest() if d[0] is not None] == [[2] * 3, [4] * 3]


@pytest.mark.parametrize("device", ["cuda", "disk", 1])
def test_other_places_are_refused(device: Any) -> None:
    with pytest.raises(ValueError, match="direction_device is .*; allowed: none, cpu"):
        ExtrapConfig.preset("extrap-past", direction_device=device)
