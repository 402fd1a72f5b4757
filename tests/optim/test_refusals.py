"""What cannot be extrapolated is refused in a sentence before anything is moved, stepped or loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import PRESETS, adamw, distance, identical, loss_at, make_model, take_step, values


def sgd_of(tensor: Tensor) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(tensor)], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("workers", [float("nan"), 1.5, 2.0, True, False, None, "2", 0, -1])
def test_virtual_workers_are_a_whole_number(workers: Any) -> None:
    with pytest.raises(ValueError, match=f"virtual_workers is {workers!r}; allowed: a whole number >= 1"):
        Extrapolated(sgd_of(torch.ones(2)), ExtrapConfig(), virtual_workers=workers)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), "complex64; allowed: "),
        (torch.ones(1).expand(3), r"parameter 0 .*share memory.*; allowed: "),
    ],
    ids=["complex", "expanded"],
)
def test_parameters_that_cannot_be_moved_are_refused(tensor: Tensor, message: str, preset: str) -> None:
    with pytest.raises(ValueError, match=message):
        Extrapolated(sgd_of(tensor), ExtrapConfig.preset(preset))
    optimizer = Extrapolated(sgd_of(torch.ones(3)), ExtrapConfig.preset(preset))
    with pytest.raises(ValueError, match=message.replace("parameter 0", "parameter 1")):
        optimizer.add_param_group({"params": [nn.Parameter(tensor)]})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_train_as_with_the_base_alone() -> None:
    ends = []
    for wrap in (lambda base: base, lambda base: Extrapolated(base, ExtrapConfig.preset("none"))):
        optimizer = wrap(sgd_of(torch.tensor([1 + 2j, 3 - 1j])))
        p = optimizer.param_groups[0]["params"][0]
        for _ in range(3):
            p.abs().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(p.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("collects", [False, True])
@pytest.mark.parametrize("preset", ["none", *PRESETS])
def test_parameters_frozen_before_the_step_are_stepped_once(preset: str, collects: bool) -> None:
    """The base optimizer steps every parameter that has a gradient."""
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Extrapolated(torch.optim.SGD([p], lr=0.1), ExtrapConfig.preset(preset))
    optimizer.collect_statistics = collects
    for step in range(4):
        x = values([p])[0]
        if optimizer.wants_probe:
            with optimizer.probing():
                p.square().sum().backward()
        optimizer.train()
        p.square().sum().backward()
        g = p.grad.clone()  # type: ignore[union-attr]
        p.requires_grad_(step != 2)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(p, x.add(g, alpha=-0.1))
        p.requires_grad_(True)
    assert optimizer.step_count == 4 and optimizer.skipped_steps == 0


@pytest.mark.parametrize("preset", ["none", *PRESETS])
def test_a_frozen_model_takes_empty_steps(preset: str) -> None:
    p = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = Extrapolated(torch.optim.SGD([p], lr=0.1), ExtrapConfig.preset(preset))
    for _ in range(2):
        take_step(optimizer, lambda: None)
    assert optimizer.step_count == 2 and torch.equal(p, torch.ones(2))


MISSING = object()


def set_in(path: str, value: Any = MISSING) -> Callable[[dict[str, Any]], None]:
    """Changes a state dict at a path, or removes what is there."""
    *parents, last = path.split("/")

    def change(state: dict[str, Any]) -> None:
        for name in parents:
            state = state[name]
        if value is MISSING:
            del state[last]
        else:
            state[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("extrap", [1, 2]), "extrap"),
        (set_in("extrap/step_count", "three"), "step_count"),
        (set_in("extrap/step_count", -1), "step_count"),
        (set_in("extrap/peak_lr", ["high"]), "peak_lr"),
        (set_in("extrap/last_step", torch.ones(2)), "last_step"),
        (set_in("extrap/local", 3), "local"),
        (set_in("extrap/local/owner"), "owner"),
        (set_in("extrap/local/directions"), "directions"),
        (set_in("extrap/local/directions/first", torch.ones(2)), "first"),
        (set_in("extrap/local/directions/0.9", torch.ones(2)), "direction of parameter 9"),
        (set_in("extrap/local/directions/0.-1", torch.ones(3, dtype=torch.float64)), "direction"),
        (set_in("extrap/local/directions/5.0", torch.ones(8, 5, dtype=torch.float64)), "worker"),
        (set_in("extrap/local/directions/0.0", torch.ones(5, 8)), "direction of parameter 0"),
        (set_in("extrap/local/curvature", {"0": "sharp"}), "curvature"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_state_is_refused_before_anything_is_loaded(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    def trained(steps: int) -> tuple[nn.Module, Extrapolated]:
        model = make_model()
        optimizer = Extrapolated(adamw(list(model.parameters())), ExtrapConfig.preset("extrap-past"))
        for step in range(steps):
            take_step(optimizer, lambda step=step: loss_at(model, step).backward())  # type: ignore[misc]
        return model, optimizer

    state = copy.deepcopy(trained(5)[1].state_dict())
    change(state)
    (model, optimizer), (twin, other) = trained(2), trained(2)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    for end, stepped in ((model, optimizer), (twin, other)):
        take_step(stepped, lambda end=end: loss_at(end, 2).backward())  # type: ignore[misc]
    assert identical(list(model.parameters()), list(twin.parameters()))
    assert optimizer.step_count == 3


@pytest.mark.parametrize("collects", [False, True])
@pytest.mark.parametrize("fields", [{}, {"precondition": True}, {"step_size": "auto"}], ids=str)
@pytest.mark.parametrize("preset", ["extrap", "extragradient"])
def test_a_group_added_between_probe_and_step(preset: str, fields: dict[str, Any], collects: bool) -> None:
    """It has no direction in this step; the others go where they would have gone."""
    ends = []
    for adds in (False, True):
        model = make_model()
        first, last = list(model[0].parameters()), list(model[2].parameters())
        optimizer = Extrapolated(torch.optim.Adam(first, lr=0.05, eps=1e-3), ExtrapConfig.preset(preset, **fields))
        optimizer.collect_statistics = collects
        for step in range(3):
            if optimizer.wants_probe:
                with optimizer.probing():
                    loss_at(model, step).backward()
            if adds and step == 2:
                optimizer.add_param_group({"params": last, "lr": 0.1})
            x = values(list(model.parameters()))
            optimizer.train()
            y = values(list(model.parameters()))
            loss_at(model, step).backward()
            optimizer.step()
            assert identical(x[2:], y[2:])
            assert (distance(x[2:], last) > 1e-3) == (adds and step == 2)
            optimizer.zero_grad()
            model.zero_grad()
        ends.append(values(first))
        assert optimizer.step_count == 3 and optimizer.skipped_steps == 0
        assert all(torch.isfinite(torch.tensor(value)) for value in optimizer.statistics.values())
    assert identical(*ends)


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "SparseAdam", "AdamW", "SGD", "LBFGS"])
def test_groups_and_defaults_hold_what_the_base_alone_has(name: str) -> None:
    def base() -> torch.optim.Optimizer:
        return getattr(torch.optim, name)([nn.Parameter(torch.ones(2, 2))], lr=0.1)

    bare, inner = base(), base()
    optimizer = Extrapolated(inner, ExtrapConfig.preset("none" if name == "LBFGS" else "extrap-past"))
    if name != "LBFGS":
        for stepped in (bare, optimizer):
            stepped.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    assert [set(group) for group in optimizer.param_groups] == [set(group) for group in bare.param_groups]
    assert optimizer.defaults == bare.defaults == inner.defaults


def test_an_optimizer_with_points_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="base is LBFGS.*allowed: direction 'none', or another optimizer"):
        Extrapolated(torch.optim.LBFGS([nn.Parameter(torch.ones(2))]), ExtrapConfig.preset("extrap-past"))
