"""The textbook algorithm, tensor by tensor: slow, and imported by the tests alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .config import ExtrapConfig

Point = list[Tensor]
"""One tensor a parameter: an iterate x, a point y, a direction d, a displacement."""

Gradient = list[Tensor | None]
"""A gradient: None for a parameter that the loss does not use."""

Loss = Callable[[Point, int, bool], Tensor]
"""f_k(point, attempt, probe): the mean loss of worker k's mini-batch ξ, or of its probe's batch ξ'."""

Noise = Callable[[int, int], Point]
"""(t, k) ↦ the i.i.d. noise of worker k at step t."""


@dataclass
class Trajectory:
    """Iterates x_0 … x_T; y and η by step and worker; L̂ by worker (one for all in global scope)."""

    x: list[Point] = field(default_factory=list)
    y: list[list[Point]] = field(default_factory=list)
    step_sizes: list[list[list[float]]] = field(default_factory=list)  # [t][k][parameter]
    curvature: list[float | None] = field(default_factory=list)
    skipped: int = 0


def extrapolate(
    x_0: Point,
    losses: Sequence[Loss],
    base: Callable[[Point], Optimizer],
    config: ExtrapConfig,
    steps: int,
    *,
    schedule: Callable[[Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    max_grad_norm: float | None = None,
    noise: Noise | None = None,
) -> Trajectory:
    """Run x_{t+1} = Base(x_t, ḡ_t) with ḡ_t = (1/K) Σ_k ∇f_k(y_t^k; ξ_t^k) and y_t^k = x_t ∓ η_t S(d_t^k, x_t).

    Args:
        x_0: the starting point, any shapes and float types; not changed.
        losses: f_1 … f_K, one a worker.
        base: makes the base optimizer from the parameters, in any number of groups.
        config: the scheme.
        steps: number of steps, skipped ones included.
        schedule: makes a learning-rate scheduler from the base optimizer.
        max_grad_norm: clip ḡ_t to this norm.
        noise: the noise of the noise directions; drawn here from `config.seed` if None.
    """
    x = [p.detach().clone().requires_grad_() for p in x_0]
    K, optimizer = len(losses), base(x)
    scheduler = schedule(optimizer) if schedule else None
    group_of = [next(group for group in optimizer.param_groups if any(p is q for q in group["params"])) for p in x]
    peak = [0.0] * len(x)
    past: list[Point] | None = None  # d_t^k left over from step t − 1; None while cold
    L: list[float | None] = [None] * K  # L̂_k
    last_step = inf  # ‖x_t − x_{t−1}‖
    step: Point | None = None  # x_{t−1} − x_t
    run = Trajectory(x=[_copy(x)], curvature=L)
    for attempt in range(steps):
        t = attempt - run.skipped
        active = config.is_active(t)
        lr = [float(group["lr"]) for group in group_of]
        peak = _each(lambda m, r, group: max(m, r, group.get("initial_lr", 0.0)), peak, lr, group_of)
        probe = active and config.step_size == "auto" and (config.is_fresh or t % config.probe_every == 0)

        d = [_zeros(x)] * K
        if active and (config.is_fresh or probe):
            d = _seen_by_workers([_gradient(f, x, attempt, True) for f in losses], config, x)
        elif active and config.is_past and past is not None:
            d = past
        elif active and config.is_noise:
            draw = noise or (lambda t, k: _noise(x, config, t, k))
            d = [draw(t, k if config.is_local else 0) for k in range(K)]

        P = _preconditioner(optimizer, x) if config.precondition else [torch.ones_like(p) for p in x]
        d_raw, d = d, [_each(torch.mul, P, v) for v in d]

        ys: list[Point] = []
        etas: list[list[float]] = []
        for k in range(K):
            eta = _each(lambda r, m: _step_size(config, L[k], r, m), lr, peak)  # noqa: B023
            move = _each(lambda e, s: e * s.detach(), eta, scaled(config.scaling, d[k], x, step))
            if config.max_displacement is not None and _norm(move) > config.max_displacement * last_step:
                cap = config.max_displacement * last_step / _norm(move)
                move = [cap * v for v in move]
            sign = 1 if config.ascent else -1
            ys.append(_each(lambda p, v: p.detach() + sign * v, x, move))  # noqa: B023
            etas.append(eta)
        g = _each(lambda f, y: _gradient(f, y, attempt, False), losses, ys)  # noqa: B023

        run.y.append(ys)
        run.step_sizes.append(etas)
        mean = _mean(g)
        if config.is_active(config.start_step) and not all(torch.isfinite(v).all() for v in mean if v is not None):
            past, run.skipped = None, run.skipped + 1
            run.x.append(_copy(x))
            continue
        if probe:
            for k, g_at_y in enumerate(_seen_by_workers(g, config, x)):
                moved = _norm(_each(lambda s, y, p: (y - p) / s.sqrt() if s.any() else 0 * p, P, ys[k], x))
                change = _norm(_each(lambda s, a, b: s.sqrt() * (a - b), P, g_at_y, d_raw[k]))
                if moved > 0 and change > 0:
                    measured = change / moved
                    before = L[k]
                    L[k] = measured if before is None else 0.9 * before + 0.1 * measured

        for p, v in zip(x, mean, strict=True):
            p.grad = v
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(x, max_grad_norm)
        consumed = [None if p.grad is None else p.grad.clone() for p in x]
        optimizer.step()
        step = _each(torch.sub, run.x[-1], _copy(x))  # x_t − x_{t+1}
        if config.direction == "past_update":
            past = [_each(lambda v, r: v / r if r > 0 else 0 * v, step, lr)] * K
        else:
            past = [_filled(v, x) for v in (g if config.scope == "local" else [consumed] * K)]
        last_step = _norm(step)
        run.x.append(_copy(x))
        if scheduler:
            scheduler.step()
    return run


def scaled(scaling: str, d: Point, x: Point, step: Point | None = None) -> Point:
    """S(d, x), the displacement for η = 1; zero where a norm in a denominator is zero.

    `none`: d. `norm`: d / ‖d‖ over all parameters. `layer`: ‖x‖ d / ‖d‖ per tensor. `filter`: the same per slice along
    the first axis of tensors of two axes and more. `adaptive`: |x|² d / ‖|x| d‖ over all parameters. `step`:
    ‖Δx‖ d / ‖d‖ over all parameters, with Δx the last step of x, and zero before there was one; `layer_step`: the same
    per tensor.
    """
    if scaling in ("step", "layer_step") and step is None:
        return _zeros(x)
    if scaling == "step":
        return [_over(_norm(step or []) * v, _norm(d)) for v in d]
    if scaling == "layer_step":
        return _each(lambda s, v: _over(_norm([s]) * v, _norm([v])), step or [], d)
    if scaling == "norm":
        return [_over(v, _norm(d)) for v in d]
    if scaling == "adaptive":
        weighted = _each(lambda p, v: p.abs() * v, x, d)
        return _each(lambda p, w: _over(p.abs() * w, _norm(weighted)), x, weighted)
    if scaling == "layer":
        return _each(lambda p, v: _over(_norm([p]) * v, _norm([v])), x, d)
    if scaling == "filter":
        return _each(lambda p, v: torch.stack(_layers(p, v)) if v.dim() >= 2 else scaled("layer", [v], [p])[0], x, d)
    return d


def _layers(p: Tensor, v: Tensor) -> Point:
    """The filters of one tensor, each scaled as a layer."""
    return scaled("layer", list(v), list(p))


def _preconditioner(optimizer: Optimizer, x: Point) -> Point:
    """P = 1 / (√v̂ + ε), of Adam; 0 before its first step."""
    scales = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if state := optimizer.state.get(p):
                v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                scales.append((p, 1 / (v.sqrt() + group["eps"])))
    return [next((scale for q, scale in scales if q is p), torch.zeros_like(p)) for p in x]


def _step_size(config: ExtrapConfig, L: float | None, lr: float, peak: float) -> float:
    """η_t of one parameter: a share of lr; or a number, or c / L̂, that anneals as lr / peak."""
    if config.step_ratio is not None:
        return config.step_ratio * lr
    factor = lr / peak if config.anneals and peak > 0 else 1.0
    if config.step_size == "auto":
        return 0.1 * lr if L is None else config.curvature_share / L * factor
    return (config.step_size or 0.0) * factor


def _gradient(f: Loss, point: Point, t: int, probe: bool) -> Gradient:
    """∇f at `point`."""
    leaves = [p.detach().clone().requires_grad_() for p in point]
    return list(torch.autograd.grad(f(leaves, t, probe), leaves, allow_unused=True))


def _mean(g: list[Gradient]) -> Gradient:
    """(1/K) Σ_k g^k; None for a parameter that no worker uses."""
    used = [[v for v in values if v is not None] for values in zip(*g, strict=True)]
    return [torch.stack(values).sum(0) / len(g) if values else None for values in used]


def _seen_by_workers(g: list[Gradient], config: ExtrapConfig, x: Point) -> list[Point]:
    """Each worker's own gradient in local scope, the average in global scope."""
    return [_filled(v, x) for v in (g if config.is_local else [_mean(g)] * len(g))]


def _filled(g: Gradient, x: Point) -> Point:
    """A direction from a gradient: zero where there is none."""
    return _each(lambda v, p: torch.zeros_like(p) if v is None else v, g, x)


def _noise(x: Point, config: ExtrapConfig, t: int, k: int) -> Point:
    """N(0, 1) or U(−1, 1) for worker k at step t."""
    generator = torch.Generator().manual_seed(hash((config.seed, t, k)) % 2**31)
    if config.direction == "gaussian":
        return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in x]
    return [2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1 for p in x]


def _each(f: Callable[..., Any], *points: Sequence[Any]) -> list[Any]:
    """f, parameter by parameter."""
    return [f(*values) for values in zip(*points, strict=True)]


def _norm(tensors: Point) -> float:
    """‖·‖ over all tensors together."""
    return sum(float((v.detach() ** 2).sum()) for v in tensors) ** 0.5


def _over(v: Tensor, norm: float) -> Tensor:
    return v / norm if norm > 0 else torch.zeros_like(v)


def _zeros(x: Point) -> Point:
    return [torch.zeros_like(p) for p in x]


def _copy(x: Point) -> Point:
    return [p.detach().clone() for p in x]
