"""The move and what surrounds it: train, eval, step, probing, workers, copies, statistics."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import (
    PRESETS,
    assert_same_run,
    distance,
    identical,
    loss_at,
    make_model,
    run_plain_loop,
    sgd,
    take_passes,
    values,
)


def warm(
    preset: str, *, workers: int = 1, dtype: torch.dtype = torch.float64, **fields: object
) -> tuple[nn.Module, Extrapolated, ExtrapConfig]:
    """A model and its optimizer after three steps."""
    model, config = make_model(dtype), ExtrapConfig.preset(preset, **fields)
    optimizer = Extrapolated(sgd(list(model.parameters())), config, virtual_workers=workers)
    run_plain_loop(model, optimizer, config, range(workers), steps=3)
    return model, optimizer, config


def backward(model: nn.Module, step: int, worker: int = 0) -> float:
    loss = loss_at(model, step, worker)
    loss.backward()
    return float(loss.detach())


def probe_if_wanted(model: nn.Module, optimizer: Extrapolated, step: int) -> None:
    if optimizer.wants_probe:
        with optimizer.probing():
            backward(model, step)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_train_is_idempotent_and_repeatable(preset: str, dtype: torch.dtype) -> None:
    """The same y, also where it is rounded at random."""
    model, optimizer, _ = warm(preset, dtype=dtype)
    params = list(model.parameters())
    x = values(params)
    probe_if_wanted(model, optimizer, 3)
    optimizer.train()
    y = values(params)
    assert distance(x, y) > 1e-4
    optimizer.train()
    assert identical(params, y)
    optimizer.eval()
    assert identical(params, x)
    optimizer.eval()
    assert identical(params, x)
    optimizer.train()
    assert identical(params, y)


@pytest.mark.parametrize("preset", ["extrap-past", "gaussian"])
def test_workers_can_be_visited_in_any_order(preset: str) -> None:
    model, optimizer, _ = warm(preset, workers=3)
    params, ys = list(model.parameters()), {}
    for k in (2, 0, 1):
        optimizer.train(worker=k)
        ys[k] = values(params)
    assert min(distance(ys[0], ys[1]), distance(ys[1], ys[2]), distance(ys[0], ys[2])) > 1e-4
    optimizer.restore()
    optimizer.train(worker=1)
    assert identical(params, ys[1])
    if preset == "gaussian":
        for k in (0, 1, 2, 1):
            optimizer.train(worker=k)
            assert identical(params, ys[k])
    else:
        # Its direction's memory has taken its y, and then the next worker's gradient.
        with pytest.raises(
            RuntimeError, match="worker 0 has left its extrapolated point.*allowed: all micro-batches of one virtual"
        ):
            optimizer.train(worker=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_order_of_the_workers_does_not_matter(preset: str) -> None:
    ends = []
    for order in ([0, 1, 2], [2, 0, 1]):
        model, config = make_model(), ExtrapConfig.preset(preset)
        optimizer = Extrapolated(sgd(list(model.parameters())), config, virtual_workers=3)
        for t in range(4):
            take_passes(optimizer, lambda k, *_: (loss_at(model, t, k) / 3).backward(), order=order)  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
        ends.append(values(list(model.parameters())))
    assert distance(*ends) < 1e-12


def test_probing_leaves_gradients_as_they_were() -> None:
    model, optimizer, _ = warm("extrap", workers=2)
    params = list(model.parameters())
    with optimizer.probing(worker=0):
        backward(model, 3)
    assert all(p.grad is None for p in params)
    optimizer.train(worker=0)
    backward(model, 3)
    grads = [p.grad.clone() for p in params]
    with optimizer.probing(worker=1):
        backward(model, 3, 1)
    assert identical([p.grad for p in params], grads)


@pytest.mark.parametrize(
    ("preset", "fields", "wanted"),
    [
        ("none", {}, []),
        ("extrap", {}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("sam", {"start_step": 2, "end_step": 5}, [2, 3, 4]),
        ("extrap-past", {}, []),
        ("extrap-past", {"step_size": "auto", "probe_every": 3}, [0, 3, 6]),
        ("optimistic", {"step_size": "auto", "probe_every": 4, "start_step": 2}, [4]),
        ("gaussian", {}, []),
    ],
)
def test_a_probe_is_wanted_when_it_is_due(preset: str, fields: dict[str, object], wanted: list[int]) -> None:
    model, config = make_model(), ExtrapConfig.preset(preset, **fields)
    optimizer = Extrapolated(sgd(list(model.parameters())), config)
    due = []
    for t in range(8):
        due += [t] * optimizer.wants_probe
        run_plain_loop(model, optimizer, config, [0], first=t, steps=1)
        assert optimizer.step_count == t + 1
    assert due == wanted


def test_a_missing_probe_is_an_error() -> None:
    """Rather than a step that silently does not extrapolate."""
    model = make_model()
    optimizer = Extrapolated(sgd(list(model.parameters())), ExtrapConfig.preset("extrap"))
    with pytest.raises(RuntimeError, match="probing"):
        optimizer.train()


@pytest.mark.parametrize("call", [lambda o, k: o.train(worker=k), lambda o, k: o.probing(worker=k).__enter__()])
@pytest.mark.parametrize("worker", [-1, 3])
def test_workers_are_bounded(worker: int, call: object) -> None:
    optimizer = Extrapolated(sgd(list(make_model().parameters())), ExtrapConfig.preset("extrap"), virtual_workers=3)
    with pytest.raises(ValueError, match=rf"{worker}.*0 to 2"):
        call(optimizer, worker)  # type: ignore[operator]


@pytest.mark.parametrize("base", [None, "sgd", object()])
def test_the_base_is_an_optimizer(base: object) -> None:
    with pytest.raises(TypeError, match="base"):
        Extrapolated(base, ExtrapConfig.preset("extrap"))  # type: ignore[arg-type]


def test_groups_state_and_defaults_are_those_of_the_base() -> None:
    model = make_model()
    base = sgd(list(model.parameters()))
    optimizer = Extrapolated(base, ExtrapConfig.preset("extrap-past"))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    run_plain_loop(model, optimizer, optimizer.config, [0], steps=2)
    assert set(optimizer.state_dict()) == {"state", "param_groups", "extrap"}
    assert optimizer.state_dict()["param_groups"] == base.state_dict()["param_groups"]
    assert len(optimizer.state) == 4 and "SGD" in repr(optimizer)


def test_step_hooks_run_once() -> None:
    model, optimizer, _ = warm("extrap-past")
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.train()
    backward(model, 3)
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
def test_copies_train_alike_and_separately(duplicate: object, preset: str) -> None:
    """A copy of model and optimizer together trains on as the original does, bit for bit, and touches nothing of it."""
    model, optimizer, config = warm(preset, workers=2)
    twin, twin_optimizer = duplicate((model, optimizer))  # type: ignore[operator]
    assert twin_optimizer.param_groups[0]["params"][0] is next(twin.parameters())
    x = values(list(model.parameters()))
    twin_run = run_plain_loop(twin, twin_optimizer, config, [0, 1], first=3, steps=3)
    assert identical(list(model.parameters()), x)
    run = run_plain_loop(model, optimizer, config, [0, 1], first=3, steps=3)
    assert_same_run(twin_run, run, 0.0)
    assert distance(run.x[0], run.x[-1]) > 1e-3


@pytest.mark.parametrize("by_backward", [False, True], ids=["autograd.grad", "backward"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_gradient_computed_between_steps_is_not_a_step(preset: str, by_backward: bool) -> None:
    """A diagnostic, say of sharpness: nothing is skipped, and no direction is lost or changed."""
    model, optimizer, config = warm(preset)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    loss = loss_at(model, 50)
    if by_backward:
        loss.backward()
        model.zero_grad()
    else:
        torch.autograd.grad(loss, list(model.parameters()))
    run = run_plain_loop(model, optimizer, config, [0], first=3, steps=2)
    assert optimizer.skipped_steps == 0
    assert_same_run(run, run_plain_loop(twin, twin_optimizer, config, [0], first=3, steps=2), 0.0)


def test_statistics_are_their_definitions() -> None:
    model, config = make_model(), ExtrapConfig.preset("extrap", scaling="none", step_size=0.3, anneal=False)
    optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=0.1), config, virtual_workers=2)
    optimizer.collect_statistics = True
    params = list(model.parameters())
    x = values(params)

    def gradient(k: int) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_at(model, 0, k), params)])

    d = [gradient(k) for k in range(2)]
    run = run_plain_loop(model, optimizer, config, [0, 1], steps=1)
    g = torch.cat([(a - b).flatten() for a, b in zip(x, run.x[1], strict=True)]) / 0.1
    statistics = optimizer.statistics
    moves = [math.sqrt(sum(float(((p - q) ** 2).sum()) for p, q in zip(x, y, strict=True))) for y in run.y[0]]
    assert statistics["displacement_norm"] == pytest.approx(sum(moves) / 2, rel=1e-6)
    assert statistics["displacement_norm"] == pytest.approx(0.3 * float(d[0].norm() + d[1].norm()) / 2, rel=1e-6)
    assert statistics["step_size"] == pytest.approx(0.3, rel=1e-6)
    cosines = [float(torch.dot(v, g) / v.norm() / g.norm()) for v in d]
    assert statistics["direction_cosine"] == pytest.approx(sum(cosines) / 2, rel=1e-5)
