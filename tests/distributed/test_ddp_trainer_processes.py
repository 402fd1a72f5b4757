"""ExtrapTrainer in two processes: accumulated gradients, virtual workers, uneven batches, DDP's switches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.reference import Loss, extrapolate
from tests.distributed.ddp_trainer_processes import CELLS, COMMON, PRESETS
from tests.support.tiny_trainer import gpt2

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, launch_here: Callable[..., Any]) -> list[dict[str, Any]]:
    """What the two processes saw."""
    return launch_here("ddp_trainer_processes.py", tmp_path_factory.mktemp("ddp_trainer"), left="ddp_trainer")


def textbook(preset: str, workers: list[list[list[Tensor]]]) -> Tensor:
    """The reference's weights after training: a worker's batches by step, its gradient the mean over a step's."""
    model = gpt2().train()
    names, steps = [name for name, _ in model.named_parameters()], len(workers[0])

    def loss_of(batches: list[list[Tensor]]) -> Loss:
        def loss(point: list[Tensor], step: int, probe: bool) -> Tensor:
            by_name = dict(zip(names, point, strict=True))
            losses = [
                torch.func.functional_call(model, by_name, kwargs={"input_ids": rows, "labels": rows}).loss
                for rows in batches[step]
            ]
            return torch.stack(losses).mean()

        return loss

    run = extrapolate(
        list(model.parameters()),
        [loss_of(batches) for batches in workers],
        lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
        ExtrapConfig.preset(preset),
        steps,
        schedule=lambda optimizer: LambdaLR(optimizer, lambda t: (steps - t) / steps),
        max_grad_norm=COMMON["max_grad_norm"],
    )
    return torch.cat([p.reshape(-1) for p in run.x[-1]])


@pytest.mark.parametrize(("preset", "way"), CELLS)
def test_two_processes_are_the_textbook(preset: str, way: str, seen: list[dict[str, Any]]) -> None:
    ranks = [rank[f"{preset}, {way}"] for rank in seen]
    assert "error" not in ranks[0], ranks[0]["error"]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    workers = [rank["sentences"] for rank in ranks]
    if way == "virtual workers":
        workers = [[[step[v]] for step in rank["sentences"]] for v in range(2) for rank in ranks]
    if way in ("accumulated", "virtual workers"):
        assert all(len(step) == 2 for rank in ranks for step in rank["sentences"])
    if way == "uneven":
        assert [[len(rows) for rows in step] for step in ranks[1]["sentences"]][7] == [2]
        assert len(ranks[0]["sentences"][7][0]) == 4
    torch.testing.assert_close(ranks[0]["weights"], textbook(preset, workers), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_the_field_decides_what_a_worker_is(preset: str, seen: list[dict[str, Any]]) -> None:
    """Alike for directions of all; local ones differ, a virtual worker's coming from one micro-batch."""
    accumulated, virtual = (seen[0][f"{preset}, {way}"]["weights"] for way in ("accumulated", "virtual workers"))
    if ExtrapConfig.preset(preset).is_local:
        assert float((accumulated - virtual).abs().max()) > 1e-5
    else:
        torch.testing.assert_close(accumulated, virtual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset", ["extrap", "extrap-past"])
def test_a_hook_of_the_users_is_called_once_a_step(preset: str, seen: list[dict[str, Any]]) -> None:
    ranks = [rank[f"{preset}, hook"] for rank in seen]
    assert [rank["calls"] for rank in ranks] == [[6], [6]]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    off = (ranks[0]["weights"] - seen[0][f"{preset}, accumulated"]["weights"]).abs().max()
    assert 1e-6 < float(off) < 1e-3
