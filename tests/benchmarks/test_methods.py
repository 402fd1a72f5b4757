"""The registry is complete, and every method trains."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from hf_extrap.benchmarks.floor import BASES
from hf_extrap.benchmarks.methods import EXTRA_ALL_REDUCES, METHODS, NotInstalled, make
from hf_extrap.benchmarks.workloads import WORKLOADS, Made, Workload
from hf_extrap.optim.config import PRESETS

PACKAGES = {
    "schedulefree": "schedulefree",
    "pytorch_optimizer SAM": "pytorch_optimizer",
    "cooper extragradient": "cooper.optim",
}
CPU = torch.device("cpu")
SIZES = {"device": CPU}


def _loss(model: nn.Module, worker: int, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(worker)
    rows = torch.randn(max(1, round(8 * share)), 6, generator=generator)
    found: Tensor = (model(rows) - rows[:, :3]).square().mean()
    return found


def tiny(base: str) -> Made:
    return Made(Workload("a linear model", lambda device: nn.Linear(6, 3).to(device), _loss, base, workers=2), CPU)


def test_every_preset_is_benched_beside_base_and_peers() -> None:
    assert set(METHODS) >= {"base", *PRESETS, *PACKAGES}
    assert set(EXTRA_ALL_REDUCES) <= set(METHODS)
    assert {workload.base for workload in WORKLOADS.values()} <= set(BASES)


@pytest.mark.parametrize("base", ["adamw", "nesterov"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_lowers_the_loss(method: str, base: str) -> None:
    if method in PACKAGES:
        pytest.importorskip(PACKAGES[method])
    made = tiny(base)
    step, _ = make(method, made)
    before = float(made.loss(0).detach() + made.loss(1).detach())
    seconds = [step() for _ in range(40)]
    after = float(made.loss(0).detach() + made.loss(1).detach())
    assert after < before
    assert min(seconds) > 0


def test_none_takes_the_steps_of_the_base() -> None:
    ends = []
    for method in ("base", "none"):
        made = tiny("adamw")
        step, _ = make(method, made)
        for _ in range(5):
            step()
        ends.append(torch.cat([p.detach().flatten() for p in made.params]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("method", PACKAGES)
def test_a_missing_peer_is_said_in_one_sentence(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[method], None)
    with pytest.raises(NotInstalled, match=r"is not installed; .*pip install .*\.$"):
        make(method, tiny("adamw"))


def test_an_unknown_method_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"method is 'lion'; allowed: base, none, extrap, .*\.$"):
        make("lion", tiny("adamw"))
