"""torch's own database of optimizers: with `none` the base bit for bit, else the textbook or a refusal."""

from __future__ import annotations

import copy
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.reference import extrapolate
from tests.support.plain_loop import assert_same_run, identical, make_model, run_plain_loop, values, worker_losses

if "expecttest" not in sys.modules:
    # Imported by torch's database, which uses nothing of it.
    stub = types.ModuleType("expecttest")
    stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules["expecttest"] = stub
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal import common_optimizers as database

pytestmark = pytest.mark.filterwarnings("ignore")
EVERY = {info.name: info for info in database.optim_db}
MOVING = [
    pytest.param(preset, marks=() if preset == "extrap-past" else pytest.mark.matrix)
    for preset in ("extrap", "extrap-past", "optimistic", "past-update", "sam")
]


def inputs_of(info: Any) -> list[dict[str, Any]]:
    """Every set of arguments; a differentiable step needs parameters that are no leaves."""
    every = database._get_optim_inputs_including_global_cliquey_kwargs(
        "cpu", torch.float32, info, skip=("differentiable",)
    )
    return [given.kwargs for given in every]


def make(info: Any, kwargs: dict[str, Any], params: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = info.optim_cls(params, **copy.deepcopy(kwargs))
    return optimizer


def parameters(info: Any, dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3, 2) if info.name == "Muon" else (3,)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def train(info: Any, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], first: int, steps: int) -> None:
    for step in range(first, first + steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = torch.stack([(p - 0.1 * step).abs().square().sum() for p in params]).sum()
            loss.backward()
            for p in params if info.only_supports_sparse_grads else ():
                p.grad = p.grad.to_sparse()  # type: ignore[union-attr]
            return loss

        if isinstance(optimizer, Extrapolated):
            optimizer.train()
        if info.step_requires_closure:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()


def whole(info: Any, optimizer: Any, params: list[nn.Parameter], wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """Some steps, the state saved and loaded into another optimizer, a group added, and some more steps."""
    steps = 1 if info.step_requires_closure else 3
    train(info, optimizer, params, 0, steps)
    saved = copy.deepcopy(optimizer.state_dict())
    again = wrap(params)
    again.load_state_dict(saved)
    if info.name != "LBFGS":
        params.append(nn.Parameter(torch.ones_like(params[0])))
        again.add_param_group({"params": [params[-1]]})
    train(info, again, params, steps, steps)
    state = again.state_dict()
    state.pop("extrap", None)
    return {"x": values(params), "state": state, "defaults": set(again.defaults)}


def assert_equal(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    elif isinstance(left, Tensor):
        assert identical([left], [right])
    else:
        assert left == right


@pytest.mark.parametrize("collects", [False, True], ids=["", "statistics"])
@pytest.mark.parametrize("name", EVERY)
def test_none_is_the_base_with_every_input(name: str, collects: bool) -> None:
    info, compared = EVERY[name], 0
    for kwargs in inputs_of(info):
        for dtype in (torch.float32, torch.complex64):
            if dtype.is_complex and (not info.supports_complex or kwargs.get("fused")):
                continue

            def bare(params: Any, kwargs: dict[str, Any] = kwargs) -> torch.optim.Optimizer:
                return make(info, kwargs, params)

            def ours(params: Any, bare: Any = bare) -> Extrapolated:
                optimizer = Extrapolated(bare(params), ExtrapConfig.preset("none"))
                optimizer.collect_statistics = collects
                return optimizer

            ends = []
            for wrap in (bare, ours):
                params = parameters(info, dtype)
                ends.append(whole(info, wrap(params), params, wrap))
            assert_equal(*ends)
            compared += 1
    assert compared >= len(info.optim_inputs_func("cpu"))


@pytest.mark.parametrize("preset", MOVING)
@pytest.mark.parametrize("name", EVERY)
def test_moving_presets_are_the_textbook_or_refused(name: str, preset: str) -> None:
    info, config = EVERY[name], ExtrapConfig.preset(preset)
    for kwargs in inputs_of(info):
        if info.step_requires_closure:
            with pytest.raises(
                ValueError, match=rf"^base is {name}, which evaluates its closure .*; allowed: [^.]*\.$"
            ):
                Extrapolated(make(info, kwargs, [nn.Parameter(torch.ones(2))]), config)
            continue
        if info.supports_complex and not kwargs.get("fused"):
            with pytest.raises(ValueError, match="^parameter 0 is torch.complex64; allowed: "):
                Extrapolated(make(info, kwargs, [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))]), config)
        if info.only_supports_sparse_grads:
            embedding = nn.Embedding(5, 3, sparse=True)
            optimizer = Extrapolated(make(info, kwargs, embedding.parameters()), config)
            with pytest.raises(RuntimeError, match="^extrapolation needs dense gradients"):
                if optimizer.wants_probe:
                    with optimizer.probing():
                        embedding(torch.tensor([1, 2])).sum().backward()
                optimizer.train()
                embedding(torch.tensor([1, 2])).sum().backward()
            continue
        # Muon takes matrices alone.
        model = make_model() if name != "Muon" else nn.Sequential(nn.Linear(5, 3, bias=False)).double()
        # A large eps: where a gradient is tiny, Adam would magnify the rounding of its last bits.
        given = {**kwargs, **({"eps": 1e-3} if "eps" in kwargs or name in ("Adam", "AdamW", "NAdam", "RAdam") else {})}

        def base(params: Sequence[Tensor], given: dict[str, Any] = given) -> torch.optim.Optimizer:
            return make(info, given, params)

        textbook = extrapolate(list(model.parameters()), worker_losses(model, config, 2), base, config, 4)
        optimizer = Extrapolated(base(list(model.parameters())), config, virtual_workers=2)
        assert_same_run(run_plain_loop(model, optimizer, config, [0, 1], steps=4), textbook, 1e-8)


def test_hooks_of_the_state_run_once_around_the_whole() -> None:
    params = [nn.Parameter(torch.ones(3))]
    optimizer = Extrapolated(torch.optim.SGD(params, lr=0.1, momentum=0.9), ExtrapConfig.preset("extrap-past"))
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *words: calls.append(f"{name}: {sorted(words[1]) if len(words) > 1 else words[0] is optimizer}")

    optimizer.register_state_dict_pre_hook(note("before saving"))
    optimizer.register_state_dict_post_hook(note("after saving"))
    optimizer.register_load_state_dict_pre_hook(note("before loading"))
    optimizer.register_load_state_dict_post_hook(note("after loading"))
    state = optimizer.state_dict()
    keys = ["extrap", "param_groups", "state"]
    assert calls == ["before saving: True", f"after saving: {keys}"]
    calls.clear()
    optimizer.load_state_dict(state)
    assert calls == [f"before loading: {keys}", "after loading: True"]
    removed = optimizer.register_state_dict_post_hook(lambda _, state: {**state, "added": 1})
    assert optimizer.state_dict()["added"] == 1
    removed.remove()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "extrap"})
    optimizer.step_count = 5
    optimizer.load_state_dict(state)
    assert optimizer.step_count == 0 and "added" not in optimizer.state_dict()


@pytest.mark.parametrize("preset", ["none", "extrap-past"])
def test_hooks_of_steps_run_once(preset: str) -> None:
    """Also torch's for every optimizer, whose object is the one that steps."""
    p = nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([p], lr=0.1)
    optimizer = Extrapolated(base, ExtrapConfig.preset(preset))
    calls: list[tuple[str, torch.optim.Optimizer]] = []
    for register, name in (
        (optimizer.register_step_pre_hook, "ours, before"),
        (optimizer.register_step_post_hook, "ours, after"),
        (base.register_step_pre_hook, "base, before"),
        (base.register_step_post_hook, "base, after"),
    ):
        register(lambda stepped, args, kwargs, name=name: calls.append((name, stepped)))
    every = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append(("every, before", o))),
        register_optimizer_step_post_hook(lambda o, *_: calls.append(("every, after", o))),
    ]
    try:
        optimizer.train()
        p.sum().backward()
        optimizer.step()
    finally:
        for handle in every:
            handle.remove()
    assert [name for name, _ in calls] == [
        "ours, before",
        "every, before",
        "base, before",
        "base, after",
        "every, after",
        "ours, after",
    ]
    assert [stepped is base for _, stepped in calls] == [False, True, True, True, True, False]


class Lomo(torch.optim.Optimizer):
    """Steps in hooks of the backward pass, as lomo_optim's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})


@pytest.mark.parametrize("preset", ["none", "extrap-past"])
@pytest.mark.parametrize(
    "base", [Lomo([nn.Parameter(torch.ones(2))]), LayerWiseDummyOptimizer(lr=0.1)], ids=lambda base: type(base).__name__
)
def test_optimizers_that_step_inside_the_backward_pass_are_refused(base: torch.optim.Optimizer, preset: str) -> None:
    name = type(base).__name__
    message = f"^base is {name}, which steps inside the backward pass; allowed: {name} without Extrapolated.$"
    with pytest.raises(ValueError, match=message):
        Extrapolated(base, ExtrapConfig.preset(preset))
