"""A small problem, the plain training loop of the tests, and the textbook's run of the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.reference import Loss, Trajectory, extrapolate

STEPS = 9
PRESETS = "extrap extrap-past extragradient optimistic past-update gaussian smoothout sam asam msam".split()
"""Those that extrapolate."""


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def make_batch(
    step: int, worker: int, probe: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Inputs (7, 5) and labels (7,) that depend on the step, the worker and, if asked for, the pass."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * worker + probe)
    inputs = torch.randn(7, 5, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (7,), generator=generator)


def loss_at(model: nn.Module, step: int, worker: int = 0) -> Tensor:
    parameter = next(model.parameters())
    inputs, labels = make_batch(step, worker, dtype=parameter.dtype)
    return nn.functional.cross_entropy(model(inputs), labels)


def two_groups(parameters: Sequence[Tensor], lr: float) -> list[dict[str, object]]:
    return [{"params": list(parameters[:2]), "lr": lr}, {"params": list(parameters[2:]), "lr": lr / 3}]


def sgd(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(two_groups(parameters, 0.3), lr=0.3, momentum=0.9, nesterov=True, weight_decay=1e-2)


def adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    # A large eps: where a gradient is tiny, Adam would magnify the rounding of its last bits.
    return torch.optim.AdamW(two_groups(parameters, 0.05), lr=0.05, eps=1e-3, weight_decay=1e-2)


BASES: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}


def warm_up_and_decay(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 3) * 0.9**t)


@dataclass
class Cell:
    """One scheme of the equivalence tests, and whether the gradient is clipped."""

    config: ExtrapConfig
    max_grad_norm: float | None = None


def _cell(preset: str, max_grad_norm: float | None = None, **overrides: object) -> Cell:
    return Cell(ExtrapConfig.preset(preset, **overrides), max_grad_norm)


CELLS: dict[str, Cell] = {
    # The presets without fresh noise, as they are.
    "none": _cell("none"),
    "extrap": _cell("extrap", step_ratio=0.5),
    "extrap-past": _cell("extrap-past", step_ratio=0.5),
    "extragradient": _cell("extragradient"),
    "optimistic": _cell("optimistic"),
    "past-update": _cell("past-update"),
    "sam": _cell("sam"),
    "asam": _cell("asam"),
    "msam": _cell("msam"),
    # The step size from the curvature.
    "extrap-auto": _cell("extrap", step_size="auto"),
    "extrap-past-auto": _cell("extrap-past", step_size="auto", probe_every=3),
    "extragradient-auto": _cell("extragradient", step_size="auto"),
    "optimistic-auto": _cell("optimistic", step_size="auto", probe_every=3, curvature_share=0.15),
    "past-update-auto": _cell("past-update", step_size="auto", probe_every=4),
    # Workers share the last update, and probe each its own gradient.
    "past-update-auto-local": _cell("past-update", step_size="auto", probe_every=4, scope="local"),
    "extrap-auto-constant": _cell("extrap", step_size="auto", anneal=False),
    # The other fields.
    "extrap-annealed": _cell("extrap", step_size=0.2),
    "extrap-constant": _cell("extrap", step_size=0.2, anneal=False),
    "extrap-independent": _cell("extrap", step_ratio=0.5, batch="independent"),
    "extragradient-independent": _cell("extragradient", batch="independent"),
    "extrap-capped": _cell("extrap", step_ratio=2.0, max_displacement=0.3),
    "optimistic-capped": _cell("optimistic", max_displacement=0.2),
    "extrap-past-window": _cell("extrap-past", step_ratio=0.5, start_step=2, end_step=6),
    "extrap-window-capped": _cell("extrap", step_ratio=2.0, start_step=2, end_step=6, max_displacement=0.3),
    "past-update-window": _cell("past-update", start_step=3, end_step=7),
    "extrap-past-layer": _cell("extrap-past", step_size=0.05, scaling="layer"),
    "extrap-filter": _cell("extrap", step_size=0.05, scaling="filter"),
    "optimistic-adaptive": _cell("optimistic", step_size=0.2, scaling="adaptive"),
    "extrap-step": _cell("extrap", step_size=0.3, scaling="step"),
    "extrap-past-step": _cell("extrap-past", step_size=0.5, scaling="step"),
    "extrap-past-layer-step": _cell("extrap-past", step_size=0.5, scaling="layer_step"),
    "optimistic-layer-step-window": _cell("optimistic", step_size=0.5, scaling="layer_step", start_step=2, end_step=6),
    "sam-global": _cell("sam", scope="global"),
    "extrap-past-ascent": _cell("extrap-past", step_ratio=0.5, ascent=True),
    # Local past gradients are the workers' own, global ones those that the base consumed.
    "extrap-past-clipped": _cell("extrap-past", 0.05, step_ratio=0.5),
    "optimistic-clipped": _cell("optimistic", 0.05),
}

NOISE = {
    "gaussian": _cell("gaussian", step_size=0.05),
    "smoothout": _cell("smoothout", step_size=0.05),
    "gaussian-global": _cell("gaussian", step_size=0.05, scope="global"),
    "smoothout-global": _cell("smoothout", step_size=0.05, scope="global"),
}
"""Schemes whose noise the textbook must be given."""

AUTO_AND_CAPPED: dict[str, ExtrapConfig] = {
    **{n: CELLS[n].config for n in ("extrap-auto", "extragradient-auto", "extrap-past-auto", "extrap-capped")},
    "optimistic-auto": ExtrapConfig.preset("optimistic", step_size="auto", probe_every=2),
}
"""Schemes whose step size follows what other steps have measured, for steps that are skipped."""

SCHEMES: dict[str, ExtrapConfig] = {
    **{n: CELLS[n].config for n in ("none", "extrap", "extrap-past", "extragradient", "optimistic", "past-update")},
    "extrap, a layer's step": ExtrapConfig.preset("extrap"),
    "extrap-past, a layer's step": CELLS["extrap-past-layer-step"].config,
    "gaussian": NOISE["gaussian"].config,
    "gaussian, shared": NOISE["gaussian-global"].config,
}
"""Those that the tests of every engine run."""


@dataclass
class Run:
    """The iterates x_0 … x_T, and the points y by step and worker, each a list of tensors."""

    x: list[list[Tensor]] = field(default_factory=list)
    y: list[list[list[Tensor]]] = field(default_factory=list)


def values(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def take_passes(
    optimizer: Extrapolated,
    backward: Callable[[int, int, Any], object],
    *,
    accumulation: int = 1,
    order: Sequence[int] | None = None,
    model: nn.Module | None = None,
    at_y: Callable[[int], object] = lambda worker: None,
) -> None:
    """The passes of one step of the documentation's loop.

    Args:
        backward: called as `backward(v, index, probe)` for micro-batch `index` of virtual worker `v`; `probe` is the
            function that passes a probe's loss back, and None in regular passes.
        order: of the virtual workers.
        model: passed to `probing`.
        at_y: called with each virtual worker at its extrapolated point.
    """
    order = range(optimizer.virtual_workers) if order is None else order
    if not optimizer.config.is_local and optimizer.wants_probe:
        with optimizer.probing(model=model) as probe:
            for v in order:
                for index in range(accumulation):
                    backward(v, index, probe)
    for v in order:
        if optimizer.config.is_local and optimizer.wants_probe:
            with optimizer.probing(worker=v, model=model) as probe:
                for index in range(accumulation):
                    backward(v, index, probe)
        for index in range(accumulation):
            optimizer.train(worker=v)
            if index == 0:
                at_y(v)
            backward(v, index, None)


def take_step(optimizer: Extrapolated, backward: Callable[[], object]) -> None:
    """One step in which every pass of every worker is `backward()`."""
    take_passes(optimizer, lambda *_: backward())
    optimizer.step()
    optimizer.zero_grad()


def run_steps(
    params: Sequence[Tensor],
    optimizer: Extrapolated,
    backward: Callable[[int, int, int, Any], object],
    finish: Callable[[], object],
    *,
    first: int = 0,
    steps: int = STEPS,
    accumulation: int = 1,
    probed: nn.Module | None = None,
    held: Callable[[Sequence[Tensor]], list[Tensor]] = values,
) -> Run:
    """Steps of `take_passes`, each ended by `finish()`; `held` gives copies of what this process holds of x and y."""
    run = Run(x=[held(params)])
    for step in range(first, first + steps):
        run.y.append([])
        take_passes(
            optimizer,
            partial(backward, step),
            accumulation=accumulation,
            model=probed,
            at_y=lambda worker: run.y[-1].append(held(params)),
        )
        finish()
        run.x.append(held(params))
    return run


def finishing(
    optimizer: Any,
    params: Sequence[Tensor],
    scheduler: LRScheduler | None = None,
    max_grad_norm: float | None = None,
    set_to_none: bool = True,
) -> Callable[[], None]:
    """The end of a step: clip, step, clear the gradients, change the learning rate."""

    def finish() -> None:
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(params, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        if scheduler is not None:
            scheduler.step()

    return finish


def run_plain_loop(
    model: nn.Module,
    optimizer: Extrapolated,
    config: ExtrapConfig,
    workers: Sequence[int],
    *,
    first: int = 0,
    steps: int = STEPS,
    scheduler: LRScheduler | None = None,
    max_grad_norm: float | None = None,
    batch: Callable[[int, int, bool], tuple[Tensor, Tensor]] | None = None,
) -> Run:
    """Train in one process on `make_batch`, or on `batch(step, worker, independent)`."""
    params = list(model.parameters())

    def backward(step: int, v: int, index: int, probe: object) -> None:
        independent = probe is not None and config.batch == "independent"
        given = (step, workers[v], independent)
        inputs, labels = batch(*given) if batch else make_batch(*given, params[0].dtype)
        (nn.functional.cross_entropy(model(inputs), labels) / len(workers)).backward()

    finish = finishing(optimizer, params, scheduler, max_grad_norm)
    return run_steps(params, optimizer, backward, finish, first=first, steps=steps)


def worker_losses(
    model: nn.Module,
    config: ExtrapConfig,
    workers: int,
    batch: Callable[[int, int, bool], tuple[Tensor, Tensor]] | None = None,
) -> list[Loss]:
    """The same problem as functions of the parameters, for the reference."""
    model = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    dtype = next(model.parameters()).dtype

    def loss_of(k: int) -> Loss:
        def loss(point: list[Tensor], step: int, probe: bool) -> Tensor:
            given = (step, k, probe and config.batch == "independent")
            inputs, labels = batch(*given) if batch else make_batch(*given, dtype)
            outputs = torch.func.functional_call(model, dict(zip(names, point, strict=True)), (inputs,))
            return nn.functional.cross_entropy(outputs, labels)

        return loss

    return [loss_of(k) for k in range(workers)]


def run_virtual_workers(cell: Cell, base: str, workers: int, dtype: torch.dtype, steps: int = STEPS) -> Run:
    model = make_model(dtype)
    optimizer = Extrapolated(BASES[base](list(model.parameters())), cell.config, virtual_workers=workers)
    options: Any = {"steps": steps, "scheduler": warm_up_and_decay(optimizer), "max_grad_norm": cell.max_grad_norm}
    return run_plain_loop(model, optimizer, cell.config, range(workers), **options)


def run_reference(cell: Cell, base: str, workers: int, dtype: torch.dtype, steps: int = STEPS) -> Trajectory:
    model = make_model(dtype)
    return extrapolate(
        list(model.parameters()),
        worker_losses(model, cell.config, workers),
        BASES[base],
        cell.config,
        steps,
        schedule=warm_up_and_decay,
        max_grad_norm=cell.max_grad_norm,
    )


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of any two entries; two NaNs do not differ."""
    pairs = [(p.detach().double(), q.detach().double()) for p, q in zip(a, b, strict=True)]
    return max(float(torch.where(p.isnan() & q.isnan(), 0.0, p - q).abs().max()) for p, q in pairs)


def assert_same_run(actual: Run | Trajectory, expected: Run | Trajectory, tolerance: float) -> None:
    """Every x and every y agrees to `tolerance`; the message names the first step that does not."""
    for t, (ys, expected_ys) in enumerate(zip(actual.y, expected.y, strict=True)):
        for k, (y, expected_y) in enumerate(zip(ys, expected_ys, strict=True)):
            assert distance(y, expected_y) <= tolerance, (
                f"y of worker {k} at step {t} is off by {distance(y, expected_y)}"
            )
        off = distance(actual.x[t + 1], expected.x[t + 1])
        assert off <= tolerance, f"x after step {t} is off by {off}"


def identical(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
