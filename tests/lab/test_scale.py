"""The formulas of bytes sent and held against what runs count."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.lab.cost import FLOAT32, PRESETS, Collective, communication, memory, sent
from hf_extrap.lab.counting import held_bytes
from hf_extrap.lab.scale import draw, line, measure, plan_tables, simulation_tables
from tests.support import scale_problem

PARAMETERS = 6 * 8 + 8 + 8 * 4 + 4


def on_paper(engine: str, preset: str, ranks: int) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in communication(engine, preset, PARAMETERS, ranks, FLOAT32, node=2):
        for collective in part:
            total[collective.kind] += int(collective.size)
    return dict(total)


@pytest.mark.distributed
def test_engines_communicate_what_the_formulas_say(run_processes: Callable[..., Any], tmp_path: Path) -> None:
    zero = ("zero1", "zero2") if importlib.util.find_spec("deepspeed") else ()
    counted = run_processes(scale_problem.__name__, tmp_path, "ddp", "zero3", *zero)[0]
    assert len(counted) == 12 + len(zero) * len(PRESETS)
    for cell, sizes in counted.items():
        paper = on_paper(*cell.split(), 2)
        if cell.split()[0] in zero:
            # On gloo DeepSpeed averages with an all-reduce in the place of the reduce-scatter; 4 bytes are one float.
            reduced = paper["reduce_scatter"] + paper.get("all_reduce", 0)
            paper = {"all_reduce": reduced + 4, "all_gather": paper["all_gather"]}
        assert sizes == paper, cell
    for preset in ("extrap-past", "past-update", "gaussian", "optimistic", "extrap"):
        assert counted[f"ddp {preset}"] == counted["ddp none"] == {"all_reduce": 4 * PARAMETERS}
    assert counted["ddp extragradient"] == {"all_reduce": 2 * 4 * PARAMETERS}


@pytest.mark.distributed
@pytest.mark.matrix
def test_hsdp_communicates_what_the_formulas_say(run_processes: Callable[..., Any], tmp_path: Path) -> None:
    counted = run_processes(scale_problem.__name__, tmp_path, "hsdp", processes=4)[0]
    assert counted == {f"hsdp {preset}": on_paper("hsdp", preset, 4) for preset in PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("swap", [True, False])
def test_a_process_holds_what_the_formulas_say(preset: str, workers: int, swap: bool) -> None:
    model = nn.Sequential(nn.Linear(60, 80), nn.Linear(80, 40))
    config = ExtrapConfig.preset(preset, swap=swap)
    optimizer = Extrapolated(torch.optim.AdamW(model.parameters()), config, virtual_workers=workers)
    for _ in range(4):
        for worker in range(workers):
            if optimizer.wants_probe:
                with optimizer.probing(worker=worker):
                    model(torch.randn(4, 60)).square().mean().backward()
            optimizer.train(worker=worker)
            model(torch.randn(4, 60)).square().mean().backward()
        held = held_bytes(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    parameters = sum(p.numel() for p in model.parameters())
    paper = memory("ddp", preset, parameters, 1, FLOAT32, virtual_workers=workers, swap=swap)
    assert held == {"x": paper["x"], "directions": paper["directions"], "host": 0}
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert sum(t.numel() * t.element_size() for t in states) == paper["optimizer"]


def test_formulas_and_refusals() -> None:
    parts = [Collective("reduce_scatter", 800, 8), Collective("all_gather", 800, 8)]
    assert sent([Collective("all_reduce", 800, 8)]) == sent(parts) == 2 * 700
    # Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 GPUs.
    for engine, gigabytes in {"ddp": 120, "zero1": 31.4, "zero2": 16.6, "zero3": 1.9}.items():
        assert sum(memory(engine, "none", 7_500_000_000, 64).values()) / 1e9 == pytest.approx(gigabytes, abs=0.05)
    with pytest.raises(ValueError, match="'extrap-past', whose directions are local"):
        communication("zero3", "extrap-past", 10, 8)
    with pytest.raises(ValueError, match="ranks is 12 and node is 8"):
        memory("hsdp", "none", 10, 12)
    with pytest.raises(ValueError, match="engine is 'fsdp1'; allowed: ddp, zero1"):
        communication("fsdp1", "none", 10, 8)
    assert plan_tables(1_500_000_000, (8,)).count("refused") == 2
    assert line([1, 4, 16], [5.0, 11.0, 35.0]) == pytest.approx((3.0, 2.0))


@pytest.mark.matrix
def test_memory_of_virtual_workers_grows_by_what_the_formula_says(tmp_path: Path) -> None:
    few, many = (measure("extrap-past", workers, steps=1, width=256) for workers in (4, 36))
    size = 4 * few["parameters"]
    assert many["held"]["directions"] - few["held"]["directions"] == 32 * size
    assert many["peak_bytes"] - few["peak_bytes"] == pytest.approx(32 * size, rel=0.15)
    # The host holds one direction a worker, and the device two: this worker's and the next one's.
    host = measure("extrap-past, on the host", 4, steps=1, width=256)
    assert host["held"] == {"x": size, "directions": 2 * size, "host": 4 * size}
    draw([few, many], tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 5000
    assert f"| {(many['held']['x'] + many['held']['directions']) / 1e6:.1f}" in simulation_tables([few, many])
