"""Invariant 7: save, kill, resume: the same numbers, bit for bit, as the run that was never stopped.

With another number of workers the direction starts cold, with a warning, and nothing else is lost.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import (
    BASES,
    CELLS,
    NOISE,
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
    **{name: NOISE[name].config for name in ("gaussian", "smoothout")},
    "gaussian-global": ExtrapConfig.preset("gaussian", scope="global", max_displacement=0.5),
    "extrap-past-half": ExtrapConfig.preset("extrap-past", direction_dtype="bfloat16"),
}


@dataclass
class Training:
    """One process that can save and load all of its state."""

    config: ExtrapConfig
    base: str = "sgd"
    workers: int = 1
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.model = make_model(self.dtype)
        params = list(self.model.parameters())
        self.optimizer = Extrapolated(BASES[self.base](params), self.config, virtual_workers=self.workers)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": warm_up_and_decay(self.optimizer)}

    def run(self, first: int, steps: int) -> Run:
        options: Any = {"first": first, "steps": steps, "scheduler": self.parts["scheduler"]}
        return run_plain_loop(self.model, self.optimizer, self.config, range(self.workers), **options)

    def save(self, path: Path) -> None:
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, path)

    def load(self, path: Path) -> Training:
        for name, state in torch.load(path, weights_only=True).items():
            self.parts[name].load_state_dict(state)
        return self


def stop_after_4(path: Path, *what: Any) -> None:
    training = Training(*what)
    training.run(0, 4)
    training.save(path)


def assert_same_rest(resumed: Run, whole: Run, stop: int) -> None:
    for t, (x, ys) in enumerate(zip(resumed.x, resumed.y, strict=False)):
        assert identical(x, whole.x[stop + t])
        for k, y in enumerate(ys):
            assert identical(y, whole.y[stop + t][k]), f"y of worker {k}, {t} steps after the resume"
    assert identical(resumed.x[-1], whole.x[-1])


CASES = [
    # bfloat16 rounds the same way after the resume.
    *((name, "sgd", 2, torch.bfloat16) for name in ("extrap", "past-update", "extrap-past-auto", "gaussian")),
    *((name, base, 3, torch.float32) for name, base in zip(RESUMED, cycle(BASES))),
]
MATRIX = [case for name in RESUMED for base in BASES for case in ((name, base, 1, torch.float32),)] + [
    (name, base, 3, torch.float32) for name, base in zip(RESUMED, cycle(reversed(BASES)))
]


@pytest.mark.parametrize(
    ("name", "base", "workers", "dtype"), [*CASES, *(pytest.param(*case, marks=pytest.mark.matrix) for case in MATRIX)]
)
def test_resumes_bit_for_bit(name: str, base: str, workers: int, dtype: torch.dtype, tmp_path: Path) -> None:
    what = (RESUMED[name], base, workers, dtype)
    stop_after_4(tmp_path / "at_4.pt", *what)
    assert_same_rest(Training(*what).load(tmp_path / "at_4.pt").run(4, 5), Training(*what).run(0, 9), 4)


def test_resumes_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    names = ["extrap-past", "past-update", "extrap-past-auto", "smoothout"]
    for name in names:
        stop_after_4(tmp_path / f"{name}.pt", RESUMED[name], "adamw", 2)
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from tests.invariants.test_7_resume import RESUMED, Training\n"
        "folder = Path(sys.argv[1])\n"
        "for name in sys.argv[2:]:\n"
        "    run = Training(RESUMED[name], 'adamw', 2).load(folder / f'{name}.pt').run(4, 5)\n"
        "    torch.save(run.x[-1], folder / f'{name}.end.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path, *names], check=True, timeout=120)
    for name in names:
        whole = Training(RESUMED[name], "adamw", 2).run(0, 9)
        assert identical(torch.load(tmp_path / f"{name}.end.pt", weights_only=True), whole.x[-1])


def test_saving_changes_nothing(tmp_path: Path) -> None:
    """After every step, and within one."""
    training = Training(RESUMED["extrap-past"])
    for t in range(9):
        training.run(t, 1)
        training.optimizer.train()
        training.save(tmp_path / "state.pt")
    assert identical(list(training.model.parameters()), Training(RESUMED["extrap-past"]).run(0, 9).x[-1])


@pytest.mark.parametrize("base", BASES)
def test_other_workers_start_with_cold_directions(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the local direction is lost: the state of the base, the schedule and the step count are kept."""
    config = RESUMED["extrap-past"]
    stop_after_4(tmp_path / "at_4.pt", config, base, 2)
    saved = torch.load(tmp_path / "at_4.pt", weights_only=True)
    training = Training(config, base, 3).load(tmp_path / "at_4.pt")
    optimizer = training.optimizer
    assert [record.levelname for record in caplog.records if "cold" in record.message] == ["WARNING"]
    assert optimizer.step_count == 4
    kept = optimizer.state_dict()
    assert kept["param_groups"] == saved["optimizer"]["param_groups"]
    for index, state in saved["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(kept["state"][index][key]), torch.as_tensor(value))

    run = training.run(4, 2)
    assert [distance(y, run.x[0]) for y in run.y[0]] == [0, 0, 0]
    assert min(distance(y, run.x[1]) for y in run.y[1]) > 1e-4


def test_global_directions_are_kept_by_other_workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = RESUMED["optimistic"]
    stop_after_4(tmp_path / "at_4.pt", config, "sgd", 2)
    run = Training(config, "sgd", 3).load(tmp_path / "at_4.pt").run(4, 1)
    assert identical(run.y[0][0], Training(config, "sgd", 2).run(0, 5).y[4][0])
    assert not caplog.records


def test_a_checkpoint_of_another_model_is_refused() -> None:
    """As many parameters, of other shapes."""
    training = Training(RESUMED["extrap-past"])
    training.run(0, 2)
    other = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    optimizer = Extrapolated(torch.optim.SGD(other.parameters(), lr=0.1), training.config)
    with pytest.raises(ValueError, match="another model"):
        optimizer.load_state_dict(training.optimizer.state_dict())


@pytest.mark.parametrize("name", ["extrap-past", "extrap-past-auto"])
def test_the_per_rank_state_holds_directions_and_curvature(name: str) -> None:
    """What one rank of several writes beside the optimizer's own file."""
    whole, resumed = Training(RESUMED[name], "sgd", 2), Training(RESUMED[name], "sgd", 2)
    whole.run(0, 4)
    x = values(list(whole.model.parameters()))
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    resumed.optimizer.load_local_state_dict(copy.deepcopy(whole.optimizer.local_state_dict()))
    resumed.parts["scheduler"].load_state_dict(whole.parts["scheduler"].state_dict())
    assert identical(x, list(resumed.model.parameters()))
    assert identical(resumed.run(4, 3).x[-1], whole.run(4, 3).x[-1])
