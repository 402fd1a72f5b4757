"""The compared methods as training steps: the base optimizer alone, every preset, and peers from other packages."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from hf_extrap.optim.config import PRESETS, ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated

from .timing import Step, synchronize
from .workloads import Made

Method = tuple[Callable[[], None], Any]
"""The work of one step, and the optimizer."""


class NotInstalled(ValueError):
    """The package of a peer is not installed."""


def make(name: str, made: Made) -> tuple[Step, Any]:
    """The training step of a method in `METHODS` on a model, and its optimizer.

    Raises:
        NotInstalled: if the package of a peer is missing.
    """
    try:
        work, optimizer = METHODS[name](made)
    except ImportError:
        raise NotInstalled(f"{PEERS[name]} is not installed; allowed: pip install {PEERS[name]}.") from None

    def step() -> float:
        made.pass_seconds = 0.0
        synchronize(made.device)
        started = time.perf_counter()
        work()
        synchronize(made.device)
        return time.perf_counter() - started - made.pass_seconds

    return step, optimizer


def _passes(made: Made, share: float = 1.0) -> None:
    for worker in range(made.workload.workers):
        made.backward(worker, share)


def _plain(made: Made, optimizer: Any) -> Method:
    def work() -> None:
        _passes(made)
        optimizer.step()
        optimizer.zero_grad()

    return work, optimizer


def _extrapolated(config: ExtrapConfig, made: Made) -> Method:
    workers = range(made.workload.workers)
    optimizer = Extrapolated(made.workload.optimizer(made.params), config, virtual_workers=len(workers))

    def work() -> None:
        if not config.is_local and optimizer.wants_probe:
            with optimizer.probing():
                _passes(made, config.batch_fraction)
        for worker in workers:
            if config.is_local and optimizer.wants_probe:
                with optimizer.probing(worker=worker):
                    made.backward(worker, config.batch_fraction)
            optimizer.train(worker=worker)
            made.backward(worker)
        optimizer.step()
        optimizer.zero_grad()

    return work, optimizer


def _schedule_free(made: Made) -> Method:
    library = import_module("schedulefree")
    kind = library.AdamWScheduleFree if made.workload.base == "adamw" else library.SGDScheduleFree
    optimizer = kind(made.params, lr=made.workload.optimizer(made.params).defaults["lr"])
    optimizer.train()
    return _plain(made, optimizer)


def _sam(made: Made) -> Method:
    base = made.workload.optimizer(made.params)
    names = {"lr", "fused", *(("momentum", "nesterov") if made.workload.base == "nesterov" else ())}
    fields = {name: value for name, value in base.defaults.items() if name in names}
    optimizer = import_module("pytorch_optimizer").SAM(made.params, type(base), rho=0.05, **fields)

    def work() -> None:
        _passes(made)
        optimizer.first_step(zero_grad=True)
        _passes(made)
        optimizer.second_step(zero_grad=True)

    return work, optimizer


def _extragradient(made: Made) -> Method:
    library = import_module("cooper.optim")
    if made.workload.base == "adamw":
        optimizer = library.ExtraAdam(made.params, lr=1e-3)
    else:
        optimizer = library.ExtraSGD(made.params, lr=0.01, momentum=0.9, nesterov=True)
    finish, _ = _plain(made, optimizer)

    def work() -> None:
        _passes(made)
        optimizer.extrapolation()
        optimizer.zero_grad()
        finish()

    return work, optimizer


CONFIGS = {
    **{name: ExtrapConfig.preset(name) for name in PRESETS},
    "extrap-past, copy": ExtrapConfig.preset("extrap-past", swap=False),
    "extrap-past, ratio": ExtrapConfig.preset("extrap-past", step_ratio=0.5),
    "extrap 0.5": ExtrapConfig.preset("extrap", batch_fraction=0.5),
    "extrap 0.25": ExtrapConfig.preset("extrap", batch_fraction=0.25),
}
"""Configurations of this package's methods."""

METHODS: dict[str, Callable[[Made], Method]] = {
    "base": lambda made: _plain(made, made.workload.optimizer(made.params)),
    **{name: partial(_extrapolated, config) for name, config in CONFIGS.items()},
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
