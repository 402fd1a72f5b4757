"""A plain accelerate loop in two processes: saved and loaded with the directions of each, in any order of `prepare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.training.accelerate_state import register_directions

pytestmark = pytest.mark.distributed
RUNS = [(preset, order) for preset in ("extrap-past", "none") for order in ("model first", "optimizer first")]


class Loop:
    """Two micro-batches a step, with the accelerator's accumulation, clipping, gathering and tracking."""

    def __init__(self, folder: Path, preset: str, order: str) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, project_dir=str(folder))
        set_seed(1)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        data = torch.randn(64, 5), torch.randint(3, (64,))
        base = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        optimizer = Extrapolated(base, ExtrapConfig.preset(preset))
        schedule = LambdaLR(optimizer, lambda step: 0.98**step)
        parts = [model, optimizer, DataLoader(TensorDataset(*data), batch_size=4), schedule]
        if order == "optimizer first":
            prepared = self.accelerator.prepare(*parts[::-1])[::-1]
        else:
            prepared = self.accelerator.prepare(*parts)
        self.model, self.optimizer, self.loader, self.schedule = prepared
        register_directions(self.accelerator, self.optimizer)
        self.extrapolated: Extrapolated = self.optimizer.optimizer

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def run(self) -> list[float]:
        """One pass over the data: four steps; the losses of all processes."""
        losses = []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                self.extrapolated.train()
                loss = self.loss(batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses += self.accelerator.gather(loss.detach()).tolist()
        return losses

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def directions(self) -> dict[str, torch.Tensor]:
        return {name: d.clone() for name, d in self.extrapolated.local_state_dict()["directions"].items()}


def in_processes(folder: Path) -> Any:
    found = {}
    for preset, order in RUNS:
        place = folder / f"{preset} {order}"
        loop = Loop(place, preset, order)
        loop.run()
        loop.accelerator.save_state(str(place / "state"))
        saved, x = loop.directions(), loop.weights().clone()
        whole = loop.run()
        end = loop.weights().clone()
        again = Loop(place, preset, order)
        again.accelerator.load_state(str(place / "state"))
        loaded, loaded_x = again.directions(), again.weights().clone()
        resumed = again.run()
        loop.accelerator.wait_for_everyone()
        found[f"{preset}, {order}"] = {
            "saved": saved, "loaded": loaded, "x": x, "loaded x": loaded_x, "losses": (whole, resumed),
            "ends": (end, again.weights().clone()), "world": loop.accelerator.num_processes,
        }  # fmt: skip
        loop.accelerator.free_memory()
        again.accelerator.free_memory()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, run_processes: Callable[..., Any]) -> list[dict[str, Any]]:
    return run_processes(__name__, tmp_path_factory.mktemp("accelerate"))


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("preset", ["none", "extrap-past"])
def test_a_loaded_loop_is_the_uninterrupted_one_bit_for_bit(
    preset: str, order: str, ranks: list[dict[str, Any]]
) -> None:
    runs = [rank[f"{preset}, {order}"] for rank in ranks]
    for run in runs:
        assert run["world"] == 2
        assert torch.equal(run["x"], run["loaded x"])
        assert run["saved"].keys() == run["loaded"].keys()
        assert all(torch.equal(d, run["loaded"][name]) for name, d in run["saved"].items())
        assert run["losses"][0] == run["losses"][1]
        assert torch.equal(*run["ends"])
    assert torch.equal(runs[0]["ends"][0], runs[1]["ends"][0])
    if preset == "extrap-past":
        # Each process has directions of its own.
        assert runs[0]["saved"] and not torch.equal(runs[0]["saved"]["0.0"], runs[1]["saved"]["0.0"])


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^optimizer is a SGD; allowed: Extrapolated, prepared or not\.$"):
        register_directions(Accelerator(cpu=True), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
