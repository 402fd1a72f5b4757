"""Local SGD against the textbook: each worker a model and an optimizer of its own, averaged every H steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.local_sgd import LocalSGD
from tests.optim.test_bases import Lion, Overwriting, two_groups
from tests.support.plain_loop import loss_at, make_model

Base = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


class CountingInGroups(torch.optim.Optimizer):
    """Momentum divided by a step count that is kept in the groups, as pytorch_optimizer keeps its counts."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.5)
                p.sub_(momentum, alpha=group["lr"] / group["step"])


BASES: dict[str, Base] = {
    "nesterov": lambda p: torch.optim.SGD(two_groups(p, 0.2), lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(two_groups(p, 0.05), eps=1e-3),
    "adamw, fused": lambda p: torch.optim.AdamW(two_groups(p, 0.05), eps=1e-3, fused=True),
    "lion": lambda p: Lion(two_groups(p, 0.01)),
    "overwriting": lambda p: Overwriting(two_groups(p, 0.2), lr=0.2),
    "counting in groups": lambda p: CountingInGroups(p, lr=0.2),
}


def vector(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def rate(step: int) -> float:
    return 1 / (1 + 0.2 * step)


def set_rates(optimizer: torch.optim.Optimizer, step: int, first: list[float]) -> None:
    for group, lr in zip(optimizer.param_groups, first, strict=True):
        group["lr"] = lr * rate(step)


def textbook(base: Base, workers: int, start: int, period: int, steps: int, norm: float | None) -> list[Tensor]:
    """The mean of the workers' parameters after each step, by one model and one optimizer for each worker."""
    models = [make_model() for _ in range(workers)]
    optimizers = [base(list(model.parameters())) for model in models]
    rates = [float(group["lr"]) for group in optimizers[0].param_groups]
    means = []
    for step in range(steps):
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            set_rates(optimizer, step, rates)
            optimizer.zero_grad()
            # Before the start every worker steps with the mean gradient, so that all stay alike.
            losses = [loss_at(model, step, j) for j in range(workers)] if step < start else [loss_at(model, step, k)]
            torch.stack(losses).mean().backward()
            if norm is not None:
                clip_grad_norm_(model.parameters(), norm)
            optimizer.step()
        mean = [torch.stack(same).mean(0) for same in zip(*(list(m.parameters()) for m in models), strict=True)]
        if step >= start and (step - start + 1) % period == 0:
            with torch.no_grad():
                for model in models:
                    for p, value in zip(model.parameters(), mean, strict=True):
                        p.copy_(value)
        means.append(vector(mean))
    return means


def local(
    base: Base,
    workers: int,
    start: int,
    period: int,
    steps: int,
    norm: float | None = None,
    model: nn.Module | None = None,
    optimizer: LocalSGD | None = None,
    first: int = 0,
    settle: bool = True,
) -> tuple[list[Tensor], nn.Module, LocalSGD]:
    """The same with LocalSGD, settled after each step if asked for; losses are divided by K."""
    model = make_model() if model is None else model
    optimizer = (
        LocalSGD(base(list(model.parameters())), period, virtual_workers=workers) if optimizer is None else optimizer
    )
    rates = [float(group["lr"]) for group in base(list(make_model().parameters())).param_groups]
    seen = []
    for step in range(first, steps):
        set_rates(optimizer, step, rates)
        if step == start:
            optimizer.start()
        for k in range(workers):
            if optimizer.is_local:
                with optimizer.worker(k, loss_scale=1 / workers, max_grad_norm=norm):
                    (loss_at(model, step, k) / workers).backward()
            else:
                (loss_at(model, step, k) / workers).backward()
        if norm is not None and not optimizer.is_local:
            clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        optimizer.zero_grad()
        if settle:
            optimizer.settle()
        seen.append(vector(list(model.parameters())))
    return seen, model, optimizer


@pytest.mark.parametrize("norm", [None, 0.3])
@pytest.mark.parametrize("base", BASES)
def test_virtual_workers_are_models_with_optimizers_of_their_own(base: str, norm: float | None) -> None:
    expected = textbook(BASES[base], 3, 2, 3, 9, norm)
    seen, _, _ = local(BASES[base], 3, 2, 3, 9, norm)
    for step, (a, b) in enumerate(zip(seen, expected, strict=True)):
        assert torch.allclose(a, b, rtol=0, atol=1e-12), step
    # Workers that step together to the end arrive elsewhere.
    assert (textbook(BASES[base], 3, 9, 3, 9, norm)[-1] - expected[-1]).abs().max() > 1e-5


def test_every_step_averaged_is_data_parallel_sgd() -> None:
    def sgd(p: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(two_groups(p, 0.3), lr=0.3)

    seen, _, _ = local(sgd, 4, 0, 1, 6)
    together = textbook(sgd, 4, 6, 1, 6, None)
    assert torch.allclose(torch.stack(seen), torch.stack(together), rtol=0, atol=1e-13)


def test_each_worker_has_its_own_momentum() -> None:
    base = BASES["nesterov"]
    _, model, optimizer = local(base, 2, 1, 4, 5)
    first, second = (state["state"] for state in optimizer.local_state_dict()["workers"])
    assert (first[0]["momentum_buffer"] - second[0]["momentum_buffer"]).abs().max() > 1e-3
    assert optimizer.state[next(model.parameters())]["momentum_buffer"] is first[0]["momentum_buffer"]


def test_parameters_hold_the_last_average_and_settling_keeps_the_copies() -> None:
    base = BASES["adamw"]
    settled, _, _ = local(base, 2, 1, 3, 8)
    unsettled, _, _ = local(base, 2, 1, 3, 8, settle=False)
    # Averages after the steps 3 and 6.
    for step, last in enumerate([0, 0, 0, 3, 3, 3, 6, 6]):
        assert torch.equal(unsettled[step], settled[last]), step


def test_gradients_are_summed_and_x_is_restored_within_a_step() -> None:
    model = make_model()
    optimizer = LocalSGD(BASES["nesterov"](list(model.parameters())), 2, virtual_workers=2)
    optimizer.start()
    x = vector(list(model.parameters()))
    expected = []
    for k in range(2):
        expected.append(vector(torch.autograd.grad(loss_at(model, 0, k), list(model.parameters()))))
    for k in range(2):
        with optimizer.worker(k, max_grad_norm=0.01):
            loss_at(model, 0, k).backward()
        assert torch.equal(vector(list(model.parameters())), x)
    assert torch.allclose(vector([p.grad for p in model.parameters()]), sum(expected), atol=1e-14)


def test_a_worker_with_a_non_finite_gradient_skips_its_step(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 1, virtual_workers=2)
    optimizer.start()
    x = vector(list(model.parameters()))
    gradient = vector(torch.autograd.grad(loss_at(model, 0, 1), list(model.parameters())))
    with optimizer.worker(0):
        (loss_at(model, 0, 0) * float("nan")).backward()
    with optimizer.worker(1):
        loss_at(model, 0, 1).backward()
    assert torch.equal(vector([p.grad for p in model.parameters()]), gradient)
    optimizer.step()
    assert torch.allclose(vector(list(model.parameters())), x - 0.1 * gradient / 2, rtol=0, atol=1e-15)
    assert "worker 0 skips a step" in caplog.text


@pytest.mark.parametrize("base", BASES)
def test_a_resume_at_an_average_is_exact(base: str) -> None:
    whole, _, _ = local(BASES[base], 2, 1, 3, 10)
    _, model, optimizer = local(BASES[base], 2, 1, 3, 7)
    saved = copy.deepcopy((optimizer.state_dict(), optimizer.local_state_dict()))
    again = make_model()
    again.load_state_dict(model.state_dict())
    resumed = LocalSGD(BASES[base](list(again.parameters())), 3, virtual_workers=2)
    resumed.load_state_dict(saved[0])
    resumed.load_local_state_dict(saved[1])
    assert resumed.is_local
    seen, _, _ = local(BASES[base], 2, 1, 3, 10, model=again, optimizer=resumed, first=7)
    assert torch.equal(torch.stack(seen), torch.stack(whole[7:]))


def test_states_of_other_workers_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    _, _, optimizer = local(BASES["nesterov"], 2, 1, 3, 4)
    model = make_model()
    other = LocalSGD(BASES["nesterov"](list(model.parameters())), 3, virtual_workers=3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_local_state_dict(copy.deepcopy(optimizer.local_state_dict()))
    buffers = [s["state"][0]["momentum_buffer"] for s in other.local_state_dict()["workers"]]
    first = optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert len(buffers) == 3 and all(torch.equal(b, first) for b in buffers)
    assert "1 × 2 workers and this run has 1 × 3" in caplog.text


def test_inside_an_extrapolation_that_has_ended_nothing_differs() -> None:
    base = BASES["nesterov"]
    config = ExtrapConfig.preset("extrap-past", step_ratio=0.5, end_step=1)
    alone, _, _ = local(base, 2, 1, 3, 8)
    model = make_model()
    inner = LocalSGD(base(list(model.parameters())), 3, virtual_workers=2)
    optimizer: Any = Extrapolated(inner, config, virtual_workers=2)
    rates = [float(group["lr"]) for group in inner.param_groups]
    for step in range(8):
        set_rates(optimizer, step, rates)
        if step == 1:
            inner.start()
        for k in range(2):
            optimizer.train(worker=k)
            if inner.is_local:
                with inner.worker(k, loss_scale=0.5):
                    (loss_at(model, step, k) / 2).backward()
            else:
                (loss_at(model, step, k) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    inner.settle()
    assert torch.equal(vector(list(model.parameters())), alone[-1])
    assert optimizer.skipped_steps == 0 and optimizer.step_count == 8


def test_wrong_use_is_refused() -> None:
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="local_steps is 0; allowed"):
        LocalSGD(base, 0)
    optimizer = LocalSGD(base, 2)
    with pytest.raises(RuntimeError, match="only after start"), optimizer.worker(0):
        pass
    optimizer.start()
    with pytest.raises(ValueError, match="worker is 1; allowed: 0 to 0"), optimizer.worker(1):
        pass

    class WithModes(torch.optim.SGD):
        def train(self) -> None: ...

    with pytest.raises(ValueError, match="WithModes, which moves the parameters"):
        LocalSGD(WithModes(model.parameters(), lr=0.1), 2)
