"""What is compared: the base optimizer alone, every preset, and the peers, as one training step each."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from hf_extrap.optim.config import PRESETS, ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated

from .timing import Step, synchronize
from .workloads import Made


class NotInstalled(ValueError):
    """A peer's package is missing."""


def make(name: str, made: Made) -> tuple[Step, Any]:
    """A method's step on a model of its own, and its optimizer.

    Args:
        name: one of `METHODS`.
        made: the model.

    Raises:
        ValueError: for an unknown name.
        NotInstalled: where the peer's package is not.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; allowed: {', '.join(METHODS)}.")
    return METHODS[name](made)


def _base(made: Made) -> tuple[Step, Any]:
    optimizer = made.workload.optimizer(made.params)
    return _plain(made, optimizer), optimizer


def _plain(made: Made, optimizer: Any) -> Step:
    def step() -> float:
        for worker in range(made.workload.workers):
            _backward(made, worker)
        return _seconds(made, lambda: _finish(made, optimizer))

    return step


def _extrapolated(config: ExtrapConfig) -> Callable[[Made], tuple[Step, Any]]:
    def build(made: Made) -> tuple[Step, Any]:
        workers = made.workload.workers
        optimizer = Extrapolated(made.workload.optimizer(made.params), config, virtual_workers=workers)
        share = config.batch_fraction

        def step() -> float:
            outside = 0.0
            if not config.is_local and optimizer.wants_probe:
                with optimizer.probing():
                    for worker in range(workers):
                        _backward(made, worker, share, optimizer)
            for worker in range(workers):
                if config.is_local and optimizer.wants_probe:
                    with optimizer.probing(worker=worker):
                        _backward(made, worker, share, optimizer)
                outside += _seconds(made, lambda worker=worker: optimizer.train(worker=worker))  # type: ignore[misc]
                outside += _backward(made, worker, 1.0, optimizer)
            return outside + _seconds(made, lambda: _finish(made, optimizer))

        return step, optimizer

    return build


def _schedule_free(made: Made) -> tuple[Step, Any]:
    library = _peer("schedulefree", PEERS["schedulefree"])
    if made.workload.base == "adamw":
        optimizer = library.AdamWScheduleFree(made.params, lr=1e-3)
    else:
        optimizer = library.SGDScheduleFree(made.params, lr=0.01)
    optimizer.train()
    return _plain(made, optimizer), optimizer


def _sam(made: Made) -> tuple[Step, Any]:
    library = _peer("pytorch_optimizer", PEERS["pytorch_optimizer SAM"])
    kind, fields = _base_class(made)
    optimizer = library.SAM(made.params, kind, rho=0.05, **fields)

    def step() -> float:
        for worker in range(made.workload.workers):
            _backward(made, worker)
        outside = _seconds(made, lambda: optimizer.first_step(zero_grad=True))
        for worker in range(made.workload.workers):
            _backward(made, worker)
        return outside + _seconds(made, lambda: optimizer.second_step(zero_grad=True))

    return step, optimizer


def _extragradient(made: Made) -> tuple[Step, Any]:
    library = _peer("cooper.optim", PEERS["cooper extragradient"])
    if made.workload.base == "adamw":
        optimizer = library.ExtraAdam(made.params, lr=1e-3)
    else:
        optimizer = library.ExtraSGD(made.params, lr=0.01, momentum=0.9, nesterov=True)

    def step() -> float:
        for worker in range(made.workload.workers):
            _backward(made, worker)

        def look() -> None:
            optimizer.extrapolation()
            optimizer.zero_grad()

        outside = _seconds(made, look)
        for worker in range(made.workload.workers):
            _backward(made, worker)
        return outside + _seconds(made, lambda: _finish(made, optimizer))

    return step, optimizer


CONFIGS = {
    **{name: ExtrapConfig.preset(name) for name in PRESETS},
    "extrap-past, copy": ExtrapConfig.preset("extrap-past", swap=False),
    "extrap-past, ratio": ExtrapConfig.preset("extrap-past", step_ratio=0.5),
    "extrap 0.5": ExtrapConfig.preset("extrap", batch_fraction=0.5),
    "extrap 0.25": ExtrapConfig.preset("extrap", batch_fraction=0.25),
}
"""The schemes of the methods that are ours."""

METHODS: dict[str, Callable[[Made], tuple[Step, Any]]] = {
    "base": _base,
    **{name: _extrapolated(config) for name, config in CONFIGS.items()},
    "schedulefree": _schedule_free,
    "pytorch_optimizer SAM": _sam,
    "cooper extragradient": _extragradient,
}
"""Everything that can be compared; `base` is what the others are compared with."""

PEERS = {
    "schedulefree": "schedulefree",
    "pytorch_optimizer SAM": "pytorch_optimizer",
    "cooper extragradient": "cooper-optim",
}
"""Packages of the methods that are not ours."""

EXTRA_ALL_REDUCES = {"extragradient": 1, "pytorch_optimizer SAM": 1, "cooper extragradient": 1}
"""Averagings of a whole gradient beside the base's one, under DistributedDataParallel; of the others none."""


def _backward(made: Made, worker: int, share: float = 1.0, optimizer: Extrapolated | None = None) -> float:
    """A pass at the point where the parameters are; of a flat list the hooks alone, whose seconds are given back."""
    if not made.workload.flat:
        made.loss(worker, share).backward()
        return 0.0
    for p, gradient in zip(made.params, made.gradients, strict=True):
        p.grad = gradient
    if optimizer is None:
        return 0.0

    def hooks() -> None:
        for i, gradient in enumerate(made.gradients):
            optimizer._capture._see(i, gradient)

    return _seconds(made, hooks)


def _finish(made: Made, optimizer: Any) -> None:
    optimizer.step()
    if not made.workload.flat:
        optimizer.zero_grad()


def _seconds(made: Made, work: Callable[[], Any]) -> float:
    synchronize(made.device)
    started = time.perf_counter()
    work()
    synchronize(made.device)
    return time.perf_counter() - started


def _peer(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise NotInstalled(f"{package} is not installed; allowed: pip install {package}.") from None


def _base_class(made: Made) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    base = made.workload.optimizer(made.params)
    fields = {"lr", "fused", *(("momentum", "nesterov") if made.workload.base == "nesterov" else ())}
    return type(base), {name: value for name, value in base.defaults.items() if name in fields}
