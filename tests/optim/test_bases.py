"""Any base optimizer: torch's, in their fast variants, and third-party ones that follow their own customs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.reference import extrapolate
from tests.support.plain_loop import (
    Cell,
    assert_same_run,
    distance,
    identical,
    make_batch,
    make_model,
    run_plain_loop,
    sgd,
    two_groups,
    values,
    worker_losses,
)


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum (Chen et al. 2023), as a third party would write it."""

    def __init__(self, params: Iterable[object], lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.sign(group["betas"][0] * m + (1 - group["betas"][0]) * p.grad))
                m.lerp_(p.grad, 1 - group["betas"][1])


class Overwriting(torch.optim.SGD):
    """Leaves its update in .grad, as LARS of pytorch_optimizer does."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(-group["lr"])


class Averaging(torch.optim.Optimizer):
    """Trains at z and is evaluated at its running mean, by `train` and `eval`, as schedule-free optimizers do."""

    def __init__(self, params: Iterable[object], lr: float = 0.2) -> None:
        super().__init__(params, {"lr": lr})
        self.training, self.steps = True, 0

    def train(self) -> None:
        self._switch(training=True)

    def eval(self) -> None:
        self._switch(training=False)

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        if self.training != training:
            self.training = training
            for p, state in self.state.items():
                here = p.clone()
                p.copy_(state["elsewhere"])
                state["elsewhere"] = here

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        if not self.training:
            raise RuntimeError("step() in evaluation mode: call train() first")
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("elsewhere", p.clone())
                p.sub_(group["lr"] * p.grad)
                mean.lerp_(p, 1 / (self.steps + 1))


BASES: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(two_groups(p, 0.2), lr=0.2),
    "sgd, foreach": lambda p: torch.optim.SGD(two_groups(p, 0.2), lr=0.2, momentum=0.9, foreach=True),
    "sgd, fused": lambda p: torch.optim.SGD(two_groups(p, 0.2), lr=0.2, momentum=0.9, nesterov=True, fused=True),
    "adamw, one by one": lambda p: torch.optim.AdamW(two_groups(p, 0.05), eps=1e-3, foreach=False),
    "adamw, foreach": lambda p: torch.optim.AdamW(two_groups(p, 0.05), eps=1e-3, foreach=True, amsgrad=True),
    "adamw, fused": lambda p: torch.optim.AdamW(two_groups(p, 0.05), eps=1e-3, fused=True),
    "adam, lr in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05, dtype=torch.float64), eps=1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-3, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, eps=1e-3),
    "lion": lambda p: Lion(two_groups(p, 0.01)),
    "sgd, overwriting": lambda p: Overwriting(two_groups(p, 0.2), lr=0.2),
}
SCHEMES = {
    "extrap": ExtrapConfig.preset("extrap", step_ratio=0.5),
    "extrap-past": ExtrapConfig.preset("extrap-past", step_ratio=0.5),
    "optimistic": ExtrapConfig.preset("optimistic"),
    "past-update": ExtrapConfig.preset("past-update"),
    "sam": ExtrapConfig.preset("sam"),
    "extrap-past-auto": ExtrapConfig.preset("extrap-past", step_size="auto", probe_every=3),
}


RUNS = [
    pytest.param(base, scheme, marks=() if base in ("sgd", "lion") or scheme == "extrap-past" else pytest.mark.matrix)
    for base in BASES
    for scheme in SCHEMES
]


@pytest.mark.parametrize(("base", "scheme"), RUNS)
def test_any_base_is_stepped_as_in_the_textbook(base: str, scheme: str) -> None:
    cell = Cell(SCHEMES[scheme])
    model = make_model()
    textbook = extrapolate(list(model.parameters()), worker_losses(model, cell.config, 2), BASES[base], cell.config, 7)
    optimizer = Extrapolated(BASES[base](list(model.parameters())), cell.config, virtual_workers=2)
    run = run_plain_loop(model, optimizer, cell.config, [0, 1], steps=7)
    assert_same_run(run, textbook, 1e-10)
    assert max(distance(y, x) for x, ys in zip(run.x, run.y, strict=False) for y in ys) > 1e-4


@pytest.mark.parametrize("base", BASES)
def test_the_state_of_any_base_is_saved_and_loaded(base: str) -> None:
    config = SCHEMES["extrap-past"]
    model = make_model(torch.float32)
    optimizer = Extrapolated(BASES[base](list(model.parameters())), config)
    whole = run_plain_loop(model, optimizer, config, [0], steps=6)
    model = make_model(torch.float32)
    optimizer = Extrapolated(BASES[base](list(model.parameters())), config)
    run_plain_loop(model, optimizer, config, [0], steps=3)
    resumed = Extrapolated(BASES[base](list(model.parameters())), config)
    resumed.load_state_dict(optimizer.state_dict())
    assert identical(run_plain_loop(model, resumed, config, [0], first=3, steps=3).x[-1], whole.x[-1])


def test_a_checkpoint_of_the_base_alone_is_loaded() -> None:
    """Extrapolation that starts within a run keeps the momentum."""
    model = make_model()
    base = sgd(list(model.parameters()))
    nn.functional.cross_entropy(model(make_batch(0, 0)[0]), make_batch(0, 0)[1]).backward()
    base.step()
    base.zero_grad()
    momentum = values([state["momentum_buffer"] for state in base.state.values()])
    optimizer = Extrapolated(sgd(list(model.parameters())), ExtrapConfig.preset("extrap-past"))
    optimizer.load_state_dict(base.state_dict())
    assert identical([state["momentum_buffer"] for state in optimizer.state.values()], momentum)
    run = run_plain_loop(model, optimizer, optimizer.config, [0], first=1, steps=2)
    assert distance(run.y[0][0], run.x[0]) == 0 and distance(run.y[1][0], run.x[1]) > 1e-4


@pytest.mark.parametrize("left_before_step", [False, True], ids=["", "left before step"])
@pytest.mark.parametrize("preset", ["none", "extrap", "extrap-past", "past-update"])
def test_a_base_with_a_mode_of_its_own(preset: str, left_before_step: bool) -> None:
    """x is the base's training point: `probing` and `train` enter its training mode first, `eval` leaves it after."""
    model = make_model()
    config = ExtrapConfig.preset(preset, **({} if preset == "none" else {"step_ratio": 0.5}))
    optimizer = Extrapolated(Averaging(list(model.parameters())), config)
    params = list(model.parameters())
    z = values(params)
    mean, d = values(params), [torch.zeros_like(p) for p in params]
    for t in range(5):
        inputs, labels = make_batch(t, 0)
        if optimizer.wants_probe:
            with optimizer.probing():
                assert distance(params, z) < 1e-12
                nn.functional.cross_entropy(model(inputs), labels).backward()
                d = [p.grad.clone() for p in params]
        optimizer.train()
        eta = (config.step_ratio or 0.0) * 0.2
        assert distance(params, [p - eta * v for p, v in zip(z, d, strict=True)]) < 1e-12
        nn.functional.cross_entropy(model(inputs), labels).backward()
        g = [p.grad.clone() for p in params]
        if left_before_step:
            optimizer.eval()
        optimizer.step()
        optimizer.zero_grad()
        z = [p - 0.2 * v for p, v in zip(z, g, strict=True)]
        mean = [m + (p - m) / (t + 2) for m, p in zip(mean, z, strict=True)]
        d = g if preset in ("extrap-past", "past-update") else d
        optimizer.eval()
        assert distance(params, mean) < 1e-12
