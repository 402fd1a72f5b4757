"""Invariant 7: saved, killed, resumed, a run goes on bit for bit; with other workers cold, with a warning, complete."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.plain_loop import (
    BASES,
    CELLS,
    Run,
    distance,
    identical,
    make_model,
    run_plain_loop,
    values,
    warm_up_and_decay,
)

RESUMED = {
    **{name: cell.config for name, cell in CELLS.items()},
    "gaussian": ExtrapConfig.preset("gaussian", step_size=0.05),
    "smoothout": ExtrapConfig.preset("smoothout", step_size=0.05),
    "gaussian-global": ExtrapConfig.preset("gaussian", scope="global", max_displacement=0.5),
    "extrap-past-half": ExtrapConfig.preset("extrap-past", direction_dtype="bfloat16"),
}


def go_on(checkpoint: Path, config: ExtrapConfig, base: str, workers: int, first: int, steps: int) -> Run:
    """Build everything anew, load, and train on."""
    saved = torch.load(checkpoint, weights_only=True)
    model = make_model(saved["dtype"])
    optimizer = Extrapolated(BASES[base](list(model.parameters())), config, virtual_workers=workers)
    scheduler = warm_up_and_decay(optimizer)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    return run_plain_loop(model, optimizer, config, range(workers), first=first, steps=steps, scheduler=scheduler)


def stop_after(
    checkpoint: Path, config: ExtrapConfig, base: str, workers: int, steps: int, dtype: torch.dtype = torch.float32
) -> None:
    model = make_model(dtype)
    optimizer = Extrapolated(BASES[base](list(model.parameters())), config, virtual_workers=workers)
    scheduler = warm_up_and_decay(optimizer)
    run_plain_loop(model, optimizer, config, range(workers), steps=steps, scheduler=scheduler)
    saved = {"optimizer": optimizer.state_dict(), "model": model.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({**saved, "dtype": dtype}, checkpoint)


def never_stopped(config: ExtrapConfig, base: str, workers: int, steps: int, dtype: torch.dtype = torch.float32) -> Run:
    model = make_model(dtype)
    optimizer = Extrapolated(BASES[base](list(model.parameters())), config, virtual_workers=workers)
    scheduler = warm_up_and_decay(optimizer)
    return run_plain_loop(model, optimizer, config, range(workers), steps=steps, scheduler=scheduler)


def assert_goes_on(resumed: Run, whole: Run, stop: int) -> None:
    for t, (x, ys) in enumerate(zip(resumed.x, resumed.y, strict=False)):
        assert identical(x, whole.x[stop + t])
        for k, y in enumerate(ys):
            assert identical(y, whole.y[stop + t][k]), f"y of worker {k}, {t} steps after the resume"
    assert identical(resumed.x[-1], whole.x[-1])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", RESUMED)
def test_resumes_bit_for_bit(name: str, workers: int, base: str, tmp_path: Path) -> None:
    config = RESUMED[name]
    stop_after(tmp_path / "at_4.pt", config, base, workers, 4)
    resumed = go_on(tmp_path / "at_4.pt", config, base, workers, 4, 5)
    assert_goes_on(resumed, never_stopped(config, base, workers, 9), 4)


@pytest.mark.parametrize("name", ["extrap", "extrap-past", "past-update", "extrap-past-auto", "gaussian"])
def test_resumes_bit_for_bit_in_bfloat16(name: str, tmp_path: Path) -> None:
    """Stochastic rounding goes on where it was, too."""
    config = RESUMED[name]
    stop_after(tmp_path / "at_4.pt", config, "sgd", 2, 4, torch.bfloat16)
    resumed = go_on(tmp_path / "at_4.pt", config, "sgd", 2, 4, 5)
    assert_goes_on(resumed, never_stopped(config, "sgd", 2, 9, torch.bfloat16), 4)


def test_resumes_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    names = ["extrap-past", "past-update", "extrap-past-auto", "smoothout"]
    for name in names:
        stop_after(tmp_path / f"{name}.pt", RESUMED[name], "adamw", 2, 4)
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from tests.invariants.test_7_resume import RESUMED, go_on\n"
        "folder = Path(sys.argv[1])\n"
        "for name in sys.argv[2:]:\n"
        "    run = go_on(folder / f'{name}.pt', RESUMED[name], 'adamw', 2, 4, 5)\n"
        "    torch.save(run.x[-1], folder / f'{name}.end.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path, *names], check=True, timeout=120)
    for name in names:
        whole = never_stopped(RESUMED[name], "adamw", 2, 9)
        assert identical(torch.load(tmp_path / f"{name}.end.pt", weights_only=True), whole.x[-1])


def test_saving_changes_nothing(tmp_path: Path) -> None:
    """A run that saves after every step, even in the midst of one, is the run that does not."""
    config = RESUMED["extrap-past"]
    model = make_model(torch.float32)
    optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), config)
    scheduler = warm_up_and_decay(optimizer)
    for t in range(9):
        run_plain_loop(model, optimizer, config, [0], first=t, steps=1, scheduler=scheduler)
        optimizer.train()
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert identical(list(model.parameters()), never_stopped(config, "sgd", 1, 9).x[-1])


@pytest.mark.parametrize("base", BASES)
def test_another_number_of_workers_starts_cold(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing but the local direction is lost: the state of the base, the schedule and the step count go on."""
    config = RESUMED["extrap-past"]
    stop_after(tmp_path / "at_4.pt", config, base, 2, 4)
    saved = torch.load(tmp_path / "at_4.pt", weights_only=True)
    model = make_model(torch.float32)
    optimizer = Extrapolated(BASES[base](list(model.parameters())), config, virtual_workers=3)
    scheduler = warm_up_and_decay(optimizer)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert [record.levelname for record in caplog.records if "cold" in record.message] == ["WARNING"]
    scheduler.load_state_dict(saved["scheduler"])

    assert optimizer.step_count == 4
    kept = optimizer.state_dict()
    assert kept["param_groups"] == saved["optimizer"]["param_groups"]
    for index, state in saved["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(kept["state"][index][key]), torch.as_tensor(value))

    run = run_plain_loop(model, optimizer, config, range(3), first=4, steps=2, scheduler=scheduler)
    assert [distance(y, run.x[0]) for y in run.y[0]] == [0, 0, 0]
    assert min(distance(y, run.x[1]) for y in run.y[1]) > 1e-4


def test_shared_directions_survive_another_number_of_workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Global directions belong to nobody: with 3 workers in place of 2 they are still warm."""
    config = RESUMED["optimistic"]
    stop_after(tmp_path / "at_4.pt", config, "sgd", 2, 4)
    run = go_on(tmp_path / "at_4.pt", config, "sgd", 3, 4, 1)
    assert identical(run.y[0][0], never_stopped(config, "sgd", 2, 5).y[4][0])
    assert not caplog.records


def test_a_checkpoint_of_another_model_is_refused() -> None:
    """As many parameters, of other shapes."""
    config = RESUMED["extrap-past"]
    model = make_model(torch.float32)
    optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=0.1), config)
    run_plain_loop(model, optimizer, config, [0], steps=2)
    other = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    with pytest.raises(ValueError, match="another model"):
        Extrapolated(torch.optim.SGD(other.parameters(), lr=0.1), config).load_state_dict(optimizer.state_dict())


def test_the_per_rank_part_travels_by_itself() -> None:
    """What one rank of several writes beside the optimizer's own file: directions, and with auto the curvature."""
    for name in ("extrap-past", "extrap-past-auto"):
        config = RESUMED[name]
        model = make_model(torch.float32)
        optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), config, virtual_workers=2)
        run_plain_loop(model, optimizer, config, [0, 1], steps=4)
        base_state, local_state = copy.deepcopy((optimizer.state_dict(), optimizer.local_state_dict()))
        x = values(list(model.parameters()))
        twin = make_model(torch.float32)
        twin.load_state_dict(model.state_dict())
        resumed = Extrapolated(BASES["sgd"](list(twin.parameters())), config, virtual_workers=2)
        resumed.load_state_dict(base_state)
        resumed.load_local_state_dict(local_state)
        assert identical(x, list(twin.parameters()))
        again = run_plain_loop(twin, resumed, config, [0, 1], first=4, steps=3)
        assert identical(again.x[-1], run_plain_loop(model, optimizer, config, [0, 1], first=4, steps=3).x[-1])
