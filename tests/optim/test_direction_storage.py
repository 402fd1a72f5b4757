"""Directions in the host's memory: the same numbers, and the same state dicts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.batched_workers import BatchedWorkers
from tests.support.kept_memory import kept_beside
from tests.support.plain_loop import identical, values

WORKERS = 3
TENSORS = 4
"""Parameters of the model."""
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which copies while it computes")


class LateCopies(TorchDispatchMode):
    """Makes the stream of every copy between host and device wait for a millisecond before it; counts them."""

    late = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if len({t.device.type for t in tree_leaves(args) if isinstance(t, Tensor)}) > 1 and "copy_" in str(func):
            torch.cuda._sleep(2_000_000)  # cycles
            self.late += 1
        return func(*args, **(kwargs or {}))


def make(
    preset: str, place: str | None, workers: int = WORKERS, device: str = "cpu", fused: bool = False, **fields: Any
) -> tuple[nn.Module, Extrapolated]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    config = ExtrapConfig.preset(preset, direction_device=place, **fields)
    base = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    return model, Extrapolated(base, config, virtual_workers=workers)


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


def workers_with_directions(optimizer: Extrapolated) -> set[str]:
    return {name.split(".")[0] for name in optimizer.local_state_dict()["directions"]}


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
        with optimizer.extrapolating(worker):
            loss(model, torch.ones(1, 5))
    train(model, optimizer, 3, 2)


def come_back(model: nn.Module, optimizer: Extrapolated) -> None:
    for step in range(4):
        for worker in range(WORKERS):
            take_pass(model, optimizer, step, worker)
            optimizer.restore()
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
    assert workers_with_directions(optimizer) == {"1", "2"}
    train(model, optimizer, 3, 2)
    optimizer.load_local_state_dict(state)
    train(model, optimizer, 5, 2)


def discard(model: nn.Module, optimizer: Extrapolated) -> None:
    train(model, optimizer, 0, 3)
    for worker in range(2):
        take_pass(model, optimizer, 3, worker)
    optimizer.discard()
    train(model, optimizer, 3, 3)


def pickle_and_resume(model: nn.Module, optimizer: Extrapolated) -> tuple[nn.Module, Extrapolated]:
    train(model, optimizer, 0, 3)
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, 3, 3)
    return model, optimizer


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
        pickle_and_resume,
        take_all_workers_at_once,
        warm_up_in_turns,
    ],
)
def test_whatever_a_loop_does_the_host_gives_the_same_numbers(run: Any, collects: bool) -> None:
    ends = [make("extrap-past", place) for place in (None, "cpu")]
    for end, (model, optimizer) in enumerate(ends):
        optimizer.collect_statistics = collects
        ends[end] = run(model, optimizer) or (model, optimizer)
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
    assert workers_with_directions(optimizer) == {"0", "2"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
@pytest.mark.parametrize("swap", [True, False])
def test_memory_is_bounded_for_any_number_of_workers(swap: bool, device: str) -> None:
    """Three tensors of each parameter beside it, y or a copy of x among them, and one a worker on the host."""
    model, optimizer = make("extrap-past", "cpu", workers=5, swap=swap, device=device)
    train(model, optimizer, 0, 2)
    for step in range(2, 6):
        for worker in range(5):
            take_pass(model, optimizer, step, worker)
            assert 5 * TENSORS <= kept_beside(model, optimizer) <= (5 + 3) * TENSORS
            assert device == "cpu" or kept_beside(model, optimizer, device) <= 3 * TENSORS
        optimizer.step()
        assert kept_beside(model, optimizer) <= (5 + 3) * TENSORS
        optimizer.zero_grad()
    directions = optimizer.local_state_dict()["directions"]
    assert len(directions) == 5 * TENSORS and {d.device.type for d in directions.values()} == {"cpu"}


def test_one_worker_needs_no_memory_on_the_host() -> None:
    kept = []
    for place in (None, "cpu"):
        model, optimizer = make("extrap-past", place, workers=1)
        train(model, optimizer, 0, 4)
        kept.append(kept_beside(model, optimizer))
    assert kept[0] == kept[1] <= 2 * TENSORS


def test_a_step_that_is_not_finite_drops_what_the_host_holds() -> None:
    model, optimizer = make("extrap-past", "cpu")
    train(model, optimizer, 0, 2)
    assert workers_with_directions(optimizer) == {"0", "1", "2"}
    optimizer.train(worker=0)
    (model(torch.full((1, 5), torch.inf)) ** 2).sum().backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not workers_with_directions(optimizer)


@on_a_gpu
@pytest.mark.parametrize("swap", [None, True])
@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "extrap", "past-update"])
def test_late_copies_give_the_same_numbers_on_a_gpu(preset: str, swap: bool | None) -> None:
    """Every copy between host and device begins late: whoever touches its memory without waiting gets other numbers."""
    near, late = (make(preset, place, swap=swap, device="cuda") for place in (None, "cpu"))
    train(*near, 0, 6)
    with LateCopies() as copies:
        train(*late, 0, 6)
    assert same(near[0], late[0])
    assert copies.late >= 100 * (preset == "extrap-past")


@on_a_gpu
@pytest.mark.parametrize("place", [None, "cpu"])
@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "extrap", "past-update", "gaussian"])
def test_no_tensor_is_read_by_the_host(preset: str, place: str | None) -> None:
    model, optimizer = make(preset, place, device="cuda", fused=True, check_finite=False)
    batch = torch.randn(4, 5, device="cuda")
    for step in range(8):
        torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
        try:
            for worker in range(WORKERS):
                if optimizer.wants_probe:
                    with optimizer.probing(worker=worker):
                        loss(model, batch).backward()
                optimizer.train(worker=worker)
                loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cuda", "disk", 1])
def test_other_places_are_refused(device: Any) -> None:
    with pytest.raises(ValueError, match="direction_device is .*; allowed: none, cpu"):
        ExtrapConfig.preset("extrap-past", direction_device=device)
