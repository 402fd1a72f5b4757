"""The compared methods as training steps: the base optimizer alone, every preset, and peers from other packages."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from hf_extrap.optim.config import PRESETS, ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated

from .timing import Step, synchronize
from .workloads import Made


class NotInstalled(ValueError):
    """The package of a peer is not installed."""


def make(name: str, made: Made) -> tuple[Step, Any]:
    """The training step of a method in `METHODS` on a model, and its optimizer.

    Raises:
        NotInstalled: if the package of a peer is missing.
    """
    return METHODS[name](made)


def _base(made: Made) -> tuple[Step, Any]:
    optimizer = made.workload.optimizer(made.params)
    return _plain(made, optimizer), optimizer


def _plain(made: Made, optimizer: Any) -> Step:
    def work() -> None:
        _passes(made)
        _finish(optimizer)

    return _timed(made, work)


def _extrapolated(config: ExtrapConfig) -> Callable[[Made], tuple[Step, Any]]:
    def build(made: Made) -> tuple[Step, Any]:
        workers = range(made.workload.workers)
        optimizer = Extrapolated(made.workload.optimizer(made.params), config, virtual_workers=len(workers))
        share = config.batch_fraction

        def work() -> None:
            if not config.is_local and optimizer.wants_probe:
                with optimizer.probing():
                    _passes(made, share)
            for worker in workers:
                if config.is_local and optimizer.wants_probe:
                    with optimizer.probing(worker=worker):
                        made.backward(worker, share)
                optimizer.train(worker=worker)
                made.backward(worker)
            _finish(optimizer)

        return _timed(made, work), optimizer

    return build


def _schedule_free(made: Made) -> tuple[Step, Any]:
    library = _peer("schedulefree", "schedulefree")
    kind = library.AdamWScheduleFree if made.workload.base == "adamw" else library.SGDScheduleFree
    optimizer = kind(made.params, lr=made.workload.optimizer(made.params).defaults["lr"])
    optimizer.train()
    return _plain(made, optimizer), optimizer


def _sam(made: Made) -> tuple[Step, Any]:
    library = _peer("pytorch_optimizer", "pytorch_optimizer SAM")
    base = made.workload.optimizer(made.params)
    names = {"lr", "fused", *(("momentum", "nesterov") if made.workload.base == "nesterov" else ())}
    fields = {name: value for name, value in base.defaults.items() if name in names}
    optimizer = library.SAM(made.params, type(base), rho=0.05, **fields)

    def work() -> None:
        _passes(made)
        optimizer.first_step(zero_grad=True)
        _passes(made)
        optimizer.second_step(zero_grad=True)

    return _timed(made, work), optimizer


def _extragradient(made: Made) -> tuple[Step, Any]:
    library = _peer("cooper.optim", "cooper extragradient")
    if made.workload.base == "adamw":
        optimizer = library.ExtraAdam(made.params, lr=1e-3)
    else:
        optimizer = library.ExtraSGD(made.params, lr=0.01, momentum=0.9, nesterov=True)

    def work() -> None:
        _passes(made)
        optimizer.extrapolation()
        optimizer.zero_grad()
        _passes(made)
        _finish(optimizer)

    return _timed(made, work), optimizer


CONFIGS = {
    **{name: ExtrapConfig.preset(name) for name in PRESETS},
    "extrap-past, copy": ExtrapConfig.preset("extrap-past", swap=False),
    "extrap-past, ratio": ExtrapConfig.preset("extrap-past", step_ratio=0.5),
    "extrap 0.5": ExtrapConfig.preset("extrap", batch_fraction=0.5),
    "extrap 0.25": ExtrapConfig.preset("extrap", batch_fraction=0.25),
}
"""Configurations of this package's methods."""

METHODS: dict[str, Callable[[Made], tuple[Step, Any]]] = {
    "base": _base,
    **{name: _extrapolated(config) for name, config in CONFIGS.items()},
    "schedulefree": _schedule_free,
    "pytorch_optimizer SAM": _sam,
    "cooper extragradient": _extragradient,
}
"""Every method, by name; the others are compared with `base`."""

PEERS = {
    "schedulefree": "schedulefree",
    "pytorch_optimizer SAM": "pytorch_optimizer",
    "cooper extragradient": "cooper-optim",
}
"""Packages of the peers."""

EXTRA_ALL_REDUCES = {"extragradient": 1, "pytorch_optimizer SAM": 1, "cooper extragradient": 1}
"""All-reduces of a whole gradient in addition to the base's, under DistributedDataParallel; 0 for other methods."""


def _timed(made: Made, work: Callable[[], object]) -> Step:
    """The work as a step that returns its seconds outside of forward and backward passes."""

    def step() -> float:
        made.pass_seconds = 0.0
        synchronize(made.device)
        started = time.perf_counter()
        work()
        synchronize(made.device)
        return time.perf_counter() - started - made.pass_seconds

    return step


def _passes(made: Made, share: float = 1.0) -> None:
    for worker in range(made.workload.workers):
        made.backward(worker, share)


def _finish(optimizer: Any) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _peer(module: str, method: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise NotInstalled(f"{PEERS[method]} is not installed; allowed: pip install {PEERS[method]}.") from None
