"""A small problem in float32, the cells of the engine tests, and the loop that every engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import BASES, take_passes, warm_up_and_decay
from tests.support.plain_loop import CELLS as PLAIN
from tests.support.plain_loop import SCHEMES as SHARED

STEPS = 12
PROCESSES = 2
INSPECTED = 5
"""The step within which a run records y, restores x and extrapolates again."""

SCHEMES = {
    **{n: SHARED[n] for n in ("none", "extrap", "extrap-past", "optimistic", "extragradient", "past-update")},
    "gaussian": SHARED["gaussian, shared"],
    # Beyond the issue's list: other scalings, the curvature, windows, caps, noise of each worker's own.
    **{n: SHARED[n] for n in ("extrap, a layer's step", "extrap-past, a layer's step")},
    "optimistic, a layer's step": ExtrapConfig.preset("optimistic", scaling="layer_step", step_size=0.3),
    "sam": PLAIN["sam"].config,
    "sam, global": PLAIN["sam-global"].config,
    "gaussian, local": SHARED["gaussian"],
    "extragradient, auto": PLAIN["extragradient-auto"].config,
    "optimistic, auto": PLAIN["optimistic-auto"].config,
    "optimistic, window": ExtrapConfig.preset("optimistic", start_step=3, end_step=9),
    "past-update, capped": ExtrapConfig.preset("past-update", max_displacement=0.3),
}
ISSUE = list(SCHEMES)[:7]


@dataclass(frozen=True)
class Cell:
    """One run; the fields say how it differs from the simplest."""

    scheme: str
    base: str = "sgd"
    workers: int = 1  # virtual ones of each process: accumulation in which each micro-batch has its own y
    micro_batches: int = 1  # of one worker's gradient: accumulation in which they share y
    clipped: bool = False
    frozen: bool = False  # the bias of the first layer

    def __str__(self) -> str:
        changed = [f for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return ", ".join([self.scheme, *(f"{f.name}={getattr(self, f.name)}" for f in changed)])

    @property
    def config(self) -> ExtrapConfig:
        return SCHEMES[self.scheme]

    @property
    def accumulation(self) -> int:
        return self.workers * self.micro_batches

    @property
    def max_norm(self) -> float:
        return 0.3 if self.clipped else 0.0

    @property
    def is_local(self) -> bool:
        return self.config.is_local and self.config.direction != "none"


FEW = [
    Cell("none", "adamw"),
    Cell("extrap", workers=2),
    Cell("extrap-past", "adamw", workers=2, clipped=True),
    Cell("extrap-past", micro_batches=2),
    Cell("optimistic", "adamw", micro_batches=2, clipped=True),
    Cell("extragradient", workers=2, frozen=True),
    Cell("past-update", "adamw", workers=2),
    Cell("gaussian", "sgd"),
    Cell("extrap, a layer's step", "adamw"),
    Cell("optimistic, a layer's step", clipped=True),
    Cell("sam, global"),
]
"""Every preset, both optimizers, both kinds of accumulation, clipping, frozen weights: what each test run does."""

ALL = [
    *(Cell(scheme, base, workers=A) for scheme in ISSUE for base in BASES for A in (1, 2)),
    *(Cell(scheme, base, micro_batches=2) for scheme in ISSUE for base in BASES),
    *(Cell(scheme, base, workers=2, clipped=True) for scheme in ISSUE for base in BASES),
    *(Cell(scheme, base, workers=A) for scheme in SCHEMES if scheme not in ISSUE for base in BASES for A in (1, 2)),
    *(Cell(scheme, frozen=True) for scheme in ISSUE),
    *(cell for cell in FEW if (cell.clipped and cell.workers == 1) or (cell.frozen and cell.workers > 1)),
]
"""The whole matrix."""
CELLS = {"few": FEW, "all": ALL}
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
SHARDED = ("zero3", "fsdp2")


def make_model() -> nn.Sequential:
    """Weights of 45, 9, 27 and 3 elements: odd ones for two processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def make_problem(cell: Cell) -> nn.Sequential:
    model = make_model()
    if cell.frozen:
        model[0].bias.requires_grad_(False)
    return model


def batch(step: int, worker: int, index: int) -> tuple[Tensor, Tensor]:
    """Inputs (7, 5) and labels (7,) of micro-batch `index` of a worker, numbered over all processes."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * worker + index)
    return torch.randn(7, 5, generator=generator), torch.randint(3, (7,), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs).float(), labels)


@dataclass
class Engine:
    """How a loop talks to one engine.

    Attributes:
        model: what is called.
        optimizer: the wrapper.
        scheduler: of the learning rate, where the engine does not step it.
        weights: gives the whole weights, in every process.
        backward: passes a loss backward.
        step: ends a micro-batch, where the engine takes the optimizer's steps; it then divides losses too.
        synchronizing: around a forward and backward pass, told whether it is the step's last.
        masters: the whole weights as the base optimizer steps them, where these are copies.
        dtype: of the inputs.
        facts: which engine it really is.
    """

    model: Any
    optimizer: Extrapolated
    scheduler: LRScheduler | None
    weights: Callable[[], list[Tensor]]
    backward: Callable[[Tensor], Any] = torch.Tensor.backward
    step: Callable[[], Any] | None = None
    synchronizing: Callable[[bool], AbstractContextManager[None]] = lambda last: nullcontext()
    masters: Callable[[], list[Tensor]] | None = None
    dtype: torch.dtype = torch.float32
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Seen:
    """What one process saw of a run."""

    losses: list[float] = field(default_factory=list)
    end: list[Tensor] = field(default_factory=list)
    displacement: float = 0.0  # the largest |x - y| of any weight, at the inspected step
    restores_x: bool = True  # to the bit, in the middle of a step
    returns_to_y: bool = True
    holds_masters: bool = True  # to the bit, after every step of a clipped cell: gathering takes time


def train(engine: Engine, cell: Cell, mine: Sequence[int], steps: Iterable[int] = range(STEPS)) -> Seen:
    """The loop of the documentation over this process's workers `mine`, numbered over all processes."""
    optimizer, seen, A = engine.optimizer, Seen(), cell.micro_batches
    last = (len(mine) - 1, A - 1)

    def backward(v: int, index: int, probe: Callable[[Tensor], Any] | None) -> None:
        inputs, labels = batch(step, mine[v], index)
        with engine.synchronizing((v, index) == last):
            loss = loss_of(engine.model, inputs.to(engine.dtype), labels)
            (probe or engine.backward)(loss / (A * len(mine)) if engine.step is None else loss)
        if not probe:
            losses.append(loss.item())
            if engine.step is not None:
                engine.step()

    def at_y(v: int) -> None:
        if (step, v) == (INSPECTED, 0):
            inspect(engine, seen, x, v)

    for step in steps:
        losses: list[float] = []
        x = engine.weights() if step == INSPECTED else []
        take_passes(optimizer, backward, accumulation=A, at_y=at_y)
        if engine.step is None:
            finish_step(engine, cell)
        seen.losses.append(sum(losses) / len(losses))
        if engine.masters is not None and cell.clipped:
            seen.holds_masters &= same(engine.weights(), engine.masters())
    seen.end = engine.weights()
    return seen


def finish_step(engine: Engine, cell: Cell) -> None:
    """What DeepSpeed does by itself."""
    if cell.clipped:
        nn.utils.clip_grad_norm_(list(engine.model.parameters()), cell.max_norm)
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    assert engine.scheduler is not None
    engine.scheduler.step()


def inspect(engine: Engine, seen: Seen, x: list[Tensor], worker: int) -> None:
    """Record y, restore x and extrapolate again."""
    y = engine.weights()
    engine.optimizer.restore()
    seen.restores_x = same(engine.weights(), x)
    engine.optimizer.train(worker=worker)
    seen.returns_to_y = same(engine.weights(), y)
    seen.displacement = max(float((a.double() - b.double()).abs().max()) for a, b in zip(x, y, strict=True))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit, in the type of the first."""
    return all(torch.equal(p, q.to(p.dtype)) for p, q in zip(a, b, strict=True))


def alone(cell: Cell, steps: int = STEPS) -> Seen:
    """One process that plays the workers of both."""
    model = make_problem(cell)
    params = list(model.parameters())
    workers = PROCESSES * cell.workers
    optimizer = Extrapolated(BASES[cell.base](params), cell.config, virtual_workers=workers)
    engine = Engine(model, optimizer, warm_up_and_decay(optimizer), lambda: [p.detach().clone() for p in params])
    return train(engine, cell, range(workers), range(steps))
