"""Directions in the host's memory: the same numbers, and the same state dicts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.batched_workers import BatchedWorkers
from hf_extrap.optim.host_store import HostStore
from hf_extrap.optim.memory import DirectionMemory
from tests.support.late_transfers import LateTransfers, Watch
from tests.support.plain_loop import identical, values

WORKERS = 3
TENSORS = 4
"""Parameters of the model."""


@pytest.fixture(autouse=True, params=["at once", "late"])
def transfers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Every test with copies made on the spot, and as late as they may be."""
    LateTransfers.running.clear()
    if request.param == "at once":
        yield False
        return
    monkeypatch.setattr("hf_extrap.optim.memory.Transfers", LateTransfers)
    with Watch():
        yield True


def make(preset: str, place: str | None, workers: int = WORKERS, **fields: Any) -> tuple[nn.Module, Extrapolated]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    config = ExtrapConfig.preset(preset, direction_device=place, **fields)
    return model, Extrapolated(torch.optim.AdamW(model.parameters(), lr=0.05), config, virtual_workers=workers)


def train(model: nn.Module, optimizer: Extrapolated, first: int, steps: int, turns: int = 1) -> None:
    for step in range(first, first + steps):
        for worker in [*range(optimizer.virtual_workers)] * turns:
            take_pass(model, optimizer, step, worker)
        optimizer.step()
        optimizer.zero_grad()


def take_pass(model: nn.Module, optimizer: Extrapolated, step: int, worker: int) -> None:
    torch.manual_seed(step * WORKERS + worker)
    batch = torch.randn(4, 5).to(next(model.parameters()).device)
    if optimizer.wants_probe:
        with optimizer.probing(worker=worker):
            loss(model, batch).backward()
    optimizer.train(worker=worker)
    loss(model, batch).backward()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch[:, :2]).square().mean() / WORKERS


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(model.parameters(), other.parameters(), strict=True))


CELLS: list[tuple[str, dict[str, Any]]] = [
    ("extrap", {}),
    ("extrap", {"step_size": "auto"}),
    ("extrap-past", {}),
    ("extrap-past", {"direction_dtype": "bfloat16"}),
    ("extrap-past", {"step_size": "auto", "probe_every": 2}),
    ("optimistic", {}),
    ("extragradient", {}),
    ("past-update", {}),
    ("extrap-past", {"swap": False}),
    ("extrap-past", {"start_step": 2, "end_step": 5}),
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


@pytest.mark.parametrize("fields", [{}, {"direction_dtype": "bfloat16"}, {"swap": False}], ids=str)
@pytest.mark.parametrize("preset", ["extrap", "extrap-past", "extragradient", "optimistic", "past-update"])
def test_a_worker_without_a_gradient_has_no_direction(preset: str, fields: dict[str, Any]) -> None:
    """Each worker uses other layers in every step: memory left from an earlier step is no direction."""
    ends = []
    for place in (None, "cpu"):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        config = ExtrapConfig.preset(preset, direction_device=place, step_size=0.5, scaling="none", **fields)
        optimizer = Extrapolated(torch.optim.SGD(layers.parameters(), lr=0.1), config, virtual_workers=WORKERS)
        generator = torch.Generator().manual_seed(1)
        visited = []
        for _ in range(8):
            chosen = torch.rand(WORKERS, 4, generator=generator).lt(0.5).tolist()
            rows = torch.randn(WORKERS, 3, 5, generator=generator)

            def backward(worker: int, chosen: Any = chosen, rows: Tensor = rows, layers: Any = layers) -> None:
                out = rows[worker]
                for layer, used in zip(layers, chosen[worker], strict=True):
                    out = torch.tanh(layer(out)) if used else out
                if out.requires_grad:
                    (out.square().mean() / WORKERS).backward()

            if not config.is_local and optimizer.wants_probe:
                with optimizer.probing():
                    for worker in range(WORKERS):
                        backward(worker)
            for worker in range(WORKERS):
                if config.is_local and optimizer.wants_probe:
                    with optimizer.probing(worker=worker):
                        backward(worker)
                optimizer.train(worker=worker)
                visited += values(list(layers.parameters()))
                backward(worker)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(visited)
    assert identical(*ends)


@pytest.mark.parametrize("saved_on", [None, "cpu"])
@pytest.mark.parametrize("loaded_on", [None, "cpu"])
def test_a_state_is_read_wherever_directions_live(saved_on: str | None, loaded_on: str | None) -> None:
    whole = make("extrap-past", None)
    train(*whole, 0, 7)
    model, optimizer = make("extrap-past", saved_on)
    train(model, optimizer, 0, 4)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert len(state["extrap"]["local"]["directions"]) == WORKERS * TENSORS
    model, optimizer = make("extrap-past", loaded_on)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, 4, 3)
    assert same(whole[0], model)


def look(model: nn.Module, optimizer: Extrapolated) -> None:
    train(model, optimizer, 0, 3)
    for worker in (1, 0, 2):
        with optimizer.looking(worker):
            loss(model, torch.ones(1, 5))
    train(model, optimizer, 3, 2)


def come_back(model: nn.Module, optimizer: Extrapolated) -> None:
    for step in range(4):
        for worker in range(WORKERS):
            take_pass(model, optimizer, step, worker)
            optimizer.rest()
            take_pass(model, optimizer, step + 10, worker)
        optimizer.step()
        optimizer.zero_grad()


def change_turns(model: nn.Module, optimizer: Extrapolated) -> None:
    for step, workers in enumerate([(0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1), (0, 1, 2)]):
        for worker in workers:
            take_pass(model, optimizer, step, worker)
        optimizer.step()
        optimizer.zero_grad()


def save_within_a_step(model: nn.Module, optimizer: Extrapolated) -> None:
    train(model, optimizer, 0, 3)
    take_pass(model, optimizer, 3, 0)
    state = copy.deepcopy(optimizer.local_state_dict())
    assert {name.split(".")[0] for name in state["directions"]} == {"1", "2"}
    train(model, optimizer, 3, 2)
    optimizer.load_local_state_dict(state)
    train(model, optimizer, 5, 2)


def discard(model: nn.Module, optimizer: Extrapolated) -> None:
    train(model, optimizer, 0, 3)
    for worker in range(2):
        take_pass(model, optimizer, 3, worker)
    optimizer.discard()
    train(model, optimizer, 3, 3)


def copy_and_go_on(model: nn.Module, optimizer: Extrapolated) -> None:
    train(model, optimizer, 0, 3)
    optimizer._memory = pickle.loads(pickle.dumps(optimizer._memory))
    optimizer._start()
    train(model, optimizer, 3, 3)


def take_all_workers_at_once(model: nn.Module, optimizer: Extrapolated) -> None:
    workers = BatchedWorkers(optimizer, model, lambda model, batch: loss(model, batch["inputs"]))
    for step in range(4):
        torch.manual_seed(step)
        workers.backward([{"inputs": torch.randn(4, 5)} for _ in range(WORKERS)])
        optimizer.step()
        optimizer.zero_grad()


def warm_up_in_turns(model: nn.Module, optimizer: Extrapolated) -> None:
    train(model, optimizer, 0, 1, turns=2)
    train(model, optimizer, 1, 3)


@pytest.mark.parametrize("collects", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        look,
        come_back,
        change_turns,
        save_within_a_step,
        discard,
        copy_and_go_on,
        take_all_workers_at_once,
        warm_up_in_turns,
    ],
)
def test_whatever_a_loop_does_the_host_gives_the_same_numbers(run: Any, collects: bool) -> None:
    ends = [make("extrap-past", place) for place in (None, "cpu")]
    for model, optimizer in ends:
        optimizer.collect_statistics = collects
        run(model, optimizer)
    (model, optimizer), (other, on_host) = ends
    assert same(model, other)
    assert optimizer.statistics == on_host.statistics
    assert ("direction_cosine" in optimizer.statistics) is collects


def test_what_float16_cannot_hold_is_no_direction() -> None:
    model, optimizer = make("extrap-past", "cpu", direction_dtype="float16", check_finite=False)
    for worker in range(WORKERS):
        optimizer.train(worker=worker)
        (loss(model, torch.ones(4, 5)) * (1e9 if worker == 1 else 1)).backward()
    optimizer.step()
    assert list(optimizer._memory.directions) == [0, 2]


@pytest.mark.parametrize("swap", [True, False])
def test_memory_goes_round(swap: bool) -> None:
    model, optimizer = make("extrap-past", "cpu", workers=5, swap=swap)
    memory = optimizer._memory
    stores = [store for store in (memory.directions, memory.captured) if isinstance(store, HostStore)]
    assert len(stores) == 2

    def near() -> int:
        """Tensors beside the parameters, y or a copy of x among them."""
        beside = [*memory.spares.tensors(), *optimizer._x.kept.values(), *(p.data for p in model.parameters())]
        for store in stores:
            beside += [*store._leaving.tensors(), *store.near()]
        return len({t.data_ptr() for t in beside}) - TENSORS

    def on_host() -> int:
        return len({t.data_ptr() for store in stores for t in store.far()})

    train(model, optimizer, 0, 2)
    for step in range(2, 6):
        for worker in range(5):
            take_pass(model, optimizer, step, worker)
            assert near() <= 3 * TENSORS
            assert on_host() == 5 * TENSORS
        optimizer.step()
        assert near() <= 3 * TENSORS
        assert on_host() == 5 * TENSORS
        optimizer.zero_grad()


def test_copies_run_while_a_worker_does(transfers: bool) -> None:
    if not transfers:
        pytest.skip("copies made on the spot are not running")
    model, optimizer = make("extrap-past", "cpu")
    running = LateTransfers.running
    train(model, optimizer, 0, 2)
    for step in range(2, 5):
        for worker in range(WORKERS):
            optimizer.train(worker=worker)
            # The gradient of the worker before goes, and the direction of the next one comes.
            assert len(running) == 2 * TENSORS
            take_pass(model, optimizer, step, worker)
            assert len(running) == 2 * TENSORS
        optimizer.step()
        assert len(running) == 2 * TENSORS
        optimizer.zero_grad()


def test_one_worker_needs_no_copies(transfers: bool) -> None:
    model, optimizer = make("extrap-past", "cpu", workers=1)
    train(model, optimizer, 0, 4)
    assert not LateTransfers.running
    assert isinstance(optimizer._memory.directions, HostStore) and not optimizer._memory.directions.far()


def test_sharded_tensors_keep_their_shards() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        memory = DirectionMemory(None, on_host=True)
        for worker in range(WORKERS):
            memory.store(worker, [distribute_tensor(torch.full((4, 2), float(worker)), mesh, [Shard(0)])])
        for worker in range(WORKERS):
            direction = memory.directions[worker][0]
            assert isinstance(direction, DTensor) and direction.placements == (Shard(0),)
            assert direction.to_local().unique().item() == worker
    finally:
        dist.destroy_process_group()


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
    assert len(store.near()) == 1


def test_one_worker_ahead_stays_until_it_is_asked_for() -> None:
    memory = DirectionMemory(None, on_host=True)
    for worker in range(4):
        memory.store(worker, [torch.full((2,), float(worker))])
    assert memory.directions[0][0].tolist() == [0, 0]  # type: ignore[union-attr]
    memory.spend(0)
    store = memory.directions
    assert isinstance(store, HostStore)
    for worker, near in ((3, 2), (1, 1), (2, 1)):
        assert store[worker][0].tolist() == [worker] * 2  # type: ignore[union-attr]
        assert len(store.near()) == near


def test_memory_of_what_is_dropped_on_its_way_is_spare_once_it_has_come() -> None:
    memory = DirectionMemory(None, on_host=True)
    for worker in range(2):
        memory.store(worker, [torch.full((2,), float(worker))])
    memory.directions[0]
    memory.spend(0)
    memory.drop_directions()
    (spare,) = memory.spares.tensors()
    assert spare.fill_(5).tolist() == [5, 5] and not LateTransfers.running


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
