"""Where x, y and directions are stored (swapped, copied, on the host): the same numbers, and bounded memory."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.batched_workers import BatchedWorkers
from hf_extrap.optim.buffers import owns_storage
from tests.support.plain_loop import (
    PRESETS,
    distance,
    identical,
    loss_at,
    make_model,
    sgd,
    take_passes,
    take_step,
    values,
)

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
    preset: str,
    place: str | None = None,
    workers: int = WORKERS,
    device: str = "cpu",
    fused: bool = False,
    **fields: Any,
) -> tuple[nn.Module, Extrapolated]:
    model = make_model(torch.float32).to(device)
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
    return (model(batch) - batch[:, :3]).square().mean() / WORKERS


def workers_with_directions(optimizer: Extrapolated) -> set[str]:
    return {name.split(".")[0] for name in optimizer.local_state_dict()["directions"]}


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def kept_beside(model: nn.Module, optimizer: Extrapolated, device: str | None = None) -> int:
    """Tensors of the parameters' shapes that the wrapper adds to parameters, gradients and the base optimizer's state.

    Shared memory is counted once; while the parameters point to y, x and y are two.

    Args:
        device: count memory of this kind alone; then parameters are on another one.
    """
    params = list(model.parameters())
    shapes = {p.shape for p in params}
    state = [t for values in optimizer.base.state.values() for t in values.values() if isinstance(t, Tensor)]
    known = {t.data_ptr() for t in (*state, *(p.grad for p in params if p.grad is not None))}
    found = {t.data_ptr() for t in (*tensors_of(optimizer), *params) if t.shape in shapes and is_on(t, device)} - known
    return len(found) - sum(is_on(p, device) for p in params)


def is_on(tensor: Tensor, device: str | None) -> bool:
    return device is None or tensor.device.type == device


def tensors_of(root: object) -> Iterable[Tensor]:
    """Every tensor that can be reached from an object, through closures too, but not through other tensors."""
    seen, found, left = {id(root)}, list[Tensor](), [root]
    while left:
        for next_ in _referents(left.pop()):
            if id(next_) not in seen and not isinstance(next_, (type, ModuleType)):
                seen.add(id(next_))
                if isinstance(next_, Tensor):
                    found.append(next_.detach())
                else:
                    left.append(next_)
    return found


def _referents(parent: Any) -> list[Any]:
    if isinstance(parent, FunctionType):
        return [parent.__closure__, parent.__defaults__, parent.__kwdefaults__]
    return gc.get_referents(parent)


CELLS: list[tuple[str, dict[str, Any]]] = [
    *((preset, {}) for preset in PRESETS),
    ("extrap", {"step_size": "auto"}),
    ("extrap-past", {"direction_dtype": "bfloat16"}),
    ("extrap-past", {"step_size": "auto", "probe_every": 2}),
    ("extrap-past", {"start_step": 2, "end_step": 5}),
]
STORAGES: list[tuple[str | None, bool]] = [(None, True), (None, False), ("cpu", True), ("cpu", False)]


@pytest.mark.parametrize("workers", [1, WORKERS])
@pytest.mark.parametrize(("preset", "fields"), CELLS, ids=str)
def test_storage_does_not_change_the_numbers(preset: str, fields: dict[str, Any], workers: int) -> None:
    ends = [make(preset, workers=workers, **fields)]
    ends += [make(preset, place, workers, swap=swap, **fields) for place, swap in STORAGES]
    stock = make("none", workers=workers)
    for model, optimizer in (*ends, stock):
        train(model, optimizer, 0, 6)
    assert all(same(ends[0][0], model) for model, _ in ends)
    pairs = zip(ends[0][0].parameters(), stock[0].parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs), "nothing was extrapolated"


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
        visited: list[Tensor] = []
        for _ in range(8):
            chosen = torch.rand(WORKERS, 4, generator=generator).lt(0.5).tolist()
            rows = torch.randn(WORKERS, 3, 5, generator=generator)

            def backward(worker: int, index: int, probe: object) -> None:
                out = rows[worker]  # noqa: B023
                for layer, used in zip(layers, chosen[worker], strict=True):  # noqa: B023
                    out = torch.tanh(layer(out)) if used else out
                if out.requires_grad:
                    (out.square().mean() / WORKERS).backward()

            take_passes(optimizer, backward, at_y=lambda _: visited.extend(values(list(layers.parameters()))))  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        ends.append(visited)
    assert identical(*ends)


@pytest.mark.parametrize("saved_on", [None, "cpu"])
@pytest.mark.parametrize("loaded_on", [None, "cpu"])
def test_a_state_of_either_device_is_loaded(saved_on: str | None, loaded_on: str | None) -> None:
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


def evaluate_at_y(model: nn.Module, optimizer: Extrapolated) -> None:
    train(model, optimizer, 0, 3)
    for worker in (1, 0, 2):
        with optimizer.extrapolating(worker):
            loss(model, torch.ones(1, 5))
    train(model, optimizer, 3, 2)


def restore_and_extrapolate_again(model: nn.Module, optimizer: Extrapolated) -> None:
    for step in range(4):
        for worker in range(WORKERS):
            take_pass(model, optimizer, step, worker)
            optimizer.restore()
            take_pass(model, optimizer, step + 10, worker)
        optimizer.step()
        optimizer.zero_grad()


def change_the_order(model: nn.Module, optimizer: Extrapolated) -> None:
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


def start_with_two_micro_batches(model: nn.Module, optimizer: Extrapolated) -> None:
    train(model, optimizer, 0, 1, turns=2)
    train(model, optimizer, 1, 3)


@pytest.mark.parametrize("collects", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        evaluate_at_y,
        restore_and_extrapolate_again,
        change_the_order,
        save_within_a_step,
        discard,
        pickle_and_resume,
        take_all_workers_at_once,
        start_with_two_micro_batches,
    ],
)
def test_loops_of_every_kind_give_the_same_numbers(run: Any, collects: bool) -> None:
    ends = [make("extrap-past", place) for place in (None, "cpu")]
    for end, (model, optimizer) in enumerate(ends):
        optimizer.collect_statistics = collects
        ends[end] = run(model, optimizer) or (model, optimizer)
    (model, optimizer), (other, on_host) = ends
    assert same(model, other)
    assert optimizer.statistics == on_host.statistics
    assert ("direction_cosine" in optimizer.statistics) is collects


def test_a_direction_that_overflows_float16_is_dropped() -> None:
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


@pytest.mark.parametrize("swap", [True, False])
def test_x_stays_in_its_memory(swap: bool) -> None:
    model, optimizer = make("extrap-past", workers=1, swap=swap)
    params = list(model.parameters())
    addresses = [p.data_ptr() for p in params]
    train(model, optimizer, 0, 2)
    assert [p.data_ptr() for p in params] == addresses
    x = values(params)
    optimizer.train()
    assert distance(x, params) > 1e-6
    assert all((p.data_ptr() == address) is not swap for p, address in zip(params, addresses, strict=True))
    optimizer.restore()
    assert identical(x, params)
    assert [p.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "past-update", "extrap", "gaussian"])
@pytest.mark.parametrize("swap", [True, False])
def test_memory_does_not_grow(preset: str, swap: bool) -> None:
    model, optimizer = make(preset, swap=swap)
    sizes = []
    for _ in range(4):
        train(model, optimizer, 0, 2)
        sizes.append(kept_beside(model, optimizer))
    assert sizes[1:] == sizes[:-1]
    # K directions and the memory that the next gradient takes; one for all otherwise, and a copy of x without swap.
    assert sizes[0] <= len(list(model.parameters())) * (WORKERS + 1 if preset == "extrap-past" else 1 + (not swap))


def test_a_direction_that_cannot_be_used_yet_is_not_kept() -> None:
    # No step has been taken whose share a move could be.
    model, optimizer = make("extrap")
    for worker in range(WORKERS):
        assert optimizer.wants_probe
        with optimizer.probing(worker=worker):
            loss_at(model, worker).backward()
        for _ in range(2):
            optimizer.train(worker=worker)
        assert not optimizer.local_state_dict()["directions"]
        loss_at(model, worker).backward()


@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "past-update"])
@pytest.mark.parametrize("swap", [True, False])
def test_evaluating_at_x_and_y_changes_nothing(swap: bool, preset: str) -> None:
    """At x between micro-batches, and at the next y between steps."""
    ends = []
    for evaluates in (False, True):
        model, optimizer = make(preset, workers=1, swap=swap)
        for step in range(4):
            if evaluates:
                x = values(list(model.parameters()))
                with optimizer.extrapolating():
                    assert step == 0 or distance(x, list(model.parameters())) > 1e-6
                assert identical(x, list(model.parameters()))
            for micro in range(2):
                optimizer.train()
                loss_at(model, 2 * step + micro).backward()
                if evaluates:
                    optimizer.eval()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(values(list(model.parameters())))
    assert identical(*ends)


def test_a_state_saved_within_a_step_starts_cold(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make("extrap-past", workers=1, swap=True)
    train(model, optimizer, 0, 2)
    x = values(list(model.parameters()))
    optimizer.train()
    state = optimizer.state_dict()
    assert identical(x, list(model.parameters()))
    _, again = make("extrap-past", workers=1, swap=True)
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
    """The parameter is moved in place as long as an alias exists, and points to y again afterwards."""
    model, optimizer = make("extrap-past", workers=1, swap=swap)
    weight, other = model[0].weight, model[2].weight
    for kept in (weight, other):
        aliases = alias(kept)
        train(model, optimizer, 0, 2)
        optimizer.train()
        y = values([kept])[0]
        assert torch.equal(aliases, kept) and aliases.data_ptr() == kept.data_ptr()
        optimizer.restore()
        assert torch.equal(aliases, kept) and not torch.equal(kept, y)
        del aliases
    address = weight.data_ptr()
    optimizer.train()
    assert (weight.data_ptr() == address) is (swap is False)


def test_owns_storage() -> None:
    whole, shared = torch.zeros(4, 2), torch.zeros(3).share_memory_()
    assert owns_storage(nn.Parameter(whole))
    assert owns_storage(nn.Parameter(whole.t()))
    tensors: list[Tensor] = [whole[:2], whole[2:], shared]
    assert not any(owns_storage(nn.Parameter(t)) for t in tensors)


def test_a_step_without_check_finite_is_the_base_optimizers() -> None:
    for checks in (True, False):
        model, optimizer = make("extrap-past", workers=1, check_finite=checks)
        optimizer.train()
        loss_at(model, 0).backward()
        next(model.parameters()).grad.fill_(float("nan"))
        optimizer.step()
        assert optimizer.skipped_steps == int(checks)
        assert bool(torch.isfinite(next(model.parameters())).all()) is checks


@on_a_gpu
@pytest.mark.parametrize("swap", [None, True])
@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "extrap", "past-update"])
def test_late_copies_give_the_same_numbers_on_a_gpu(preset: str, swap: bool | None) -> None:
    """Every copy between host and device begins late: code that does not wait for them gets other numbers."""
    near, late = (make(preset, place, swap=swap, device="cuda") for place in (None, "cpu"))
    train(*near, 0, 6)
    with LateCopies() as copies:
        train(*late, 0, 6)
    assert same(near[0], late[0])
    assert copies.late >= 100 * (preset == "extrap-past")


@on_a_gpu
@pytest.mark.parametrize("place", [None, "cpu"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_host_does_not_wait_for_the_device(preset: str, place: str | None) -> None:
    model, optimizer = make(preset, place, device="cuda", fused=True, check_finite=False)
    batch = torch.randn(4, 5, device="cuda")
    for step in range(8):
        torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
        try:
            take_step(optimizer, lambda: loss(model, batch).backward())
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cuda", "disk", 1])
def test_other_places_are_refused(device: Any) -> None:
    with pytest.raises(ValueError, match="direction_device is .*; allowed: none, cpu"):
        ExtrapConfig.preset("extrap-past", direction_device=device)
