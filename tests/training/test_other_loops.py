"""Lightning, Fabric and torch.distributed.checkpoint: the numbers of the plain loop."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import identical, loss_at, make_batch, make_model, run_plain_loop, sgd, values

pytestmark = pytest.mark.filterwarnings("ignore")
PRESETS = ["none", "extrap-past", "extrap"]
STEPS = 4


def config_of(preset: str) -> ExtrapConfig:
    return ExtrapConfig.preset(preset, **({} if preset == "none" else {"step_ratio": 0.5}))


def plain(preset: str, steps: int = STEPS) -> list[Tensor]:
    model, config = make_model(), config_of(preset)
    optimizer = Extrapolated(sgd(list(model.parameters())), config)
    return run_plain_loop(model, optimizer, config, [0], steps=steps).x[-1]


@pytest.mark.parametrize("preset", PRESETS)
def test_lightning_with_its_closures_is_the_plain_loop(preset: str, tmp_path: Path) -> None:
    """In automatic optimization `step` gets a closure, which is passed at x if the step probes, and at y."""
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed (extra test)")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    points: list[list[Tensor]] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            points.append(values(list(self.parameters())))
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Extrapolated(sgd(list(self.parameters())), config_of(preset))

    def fit(steps: int, checkpoint: str | None = None) -> tuple[Module, Any]:
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            inference_mode=False,
        )
        module = Module()
        loader = torch.utils.data.DataLoader([make_batch(step, 0) for step in range(STEPS)], batch_size=None)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return module, trainer

    module, _ = fit(STEPS)
    assert identical(values(list(module.parameters())), plain(preset))
    assert len(points) == STEPS * (2 if preset == "extrap" else 1)
    _, trainer = fit(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["optimizer_states"][0]
    assert saved["extrap"]["step_count"] == 2
    assert bool(saved["extrap"]["local"]["directions"]) == (preset == "extrap-past")


@pytest.mark.parametrize("preset", PRESETS)
def test_fabric_is_the_plain_loop(preset: str) -> None:
    """`train` and `probing` are called on the optimizer itself, `step` on Fabric's wrapper or on it."""
    fabric_module = pytest.importorskip("lightning.fabric", reason="Lightning is not installed (extra test)")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    net = make_model()
    optimizer = Extrapolated(sgd(list(net.parameters())), config_of(preset))
    model, wrapped = fabric.setup(net, optimizer)

    def loss(step: int) -> Tensor:
        inputs, labels = make_batch(step, 0)
        return nn.functional.cross_entropy(model(inputs), labels)

    for step in range(STEPS):
        if optimizer.wants_probe:
            with optimizer.probing():
                fabric.backward(loss(step))
        optimizer.train()
        fabric.backward(loss(step))
        wrapped.step()
        wrapped.zero_grad()
    assert identical(values(list(net.parameters())), plain(preset))
    assert wrapped.state_dict()["extrap"]["step_count"] == STEPS


@pytest.mark.parametrize("keeps_directions", [True, False])
@pytest.mark.parametrize("preset", ["none", "extrap-past", "past-update"])
def test_a_distributed_checkpoint_and_the_local_state_are_the_whole(
    preset: str, keeps_directions: bool, tmp_path: Path
) -> None:
    """torch keeps `state` and `param_groups` alone: without the local state directions start cold."""
    config = config_of(preset) if preset != "past-update" else ExtrapConfig.preset(preset)

    def make() -> tuple[nn.Module, Extrapolated]:
        model = make_model()
        return model, Extrapolated(sgd(list(model.parameters())), config)

    model, optimizer = make()
    run_plain_loop(model, optimizer, config, [0], steps=2)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "dcp")
    torch.save(optimizer.local_state_dict(), tmp_path / "extrap_rank_0.pt")
    whole = run_plain_loop(model, optimizer, config, [0], first=2, steps=3).x[-1]

    model, optimizer = make()
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    if keeps_directions:
        optimizer.load_local_state_dict(torch.load(tmp_path / "extrap_rank_0.pt", weights_only=True))
        assert optimizer.step_count == 2
    resumed = run_plain_loop(model, optimizer, config, [0], first=2, steps=3).x[-1]
    assert identical(resumed, whole) == (keeps_directions or preset == "none")
    assert float(loss_at(model, 9)) > 0
