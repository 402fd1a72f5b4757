"""hf-extrap bench: the compared methods, what is counted, and what a later call keeps, repeats and continues."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_extrap.cli import main
from hf_extrap.lab.bench import bench as module
from hf_extrap.lab.bench import workloads
from hf_extrap.lab.bench.bench import LOOPS, PARTS, workloads_of
from hf_extrap.lab.bench.methods import METHODS, NotInstalled, make
from hf_extrap.lab.bench.report import growth
from hf_extrap.lab.bench.timing import WARM_UPS
from hf_extrap.lab.bench.workloads import WORKLOADS, Made, Workload, flat_list, token_loss
from hf_extrap.optim.config import PRESETS

CPU = torch.device("cpu")
TINY, FLAT = "tiny", "tiny-flat"
TIMES = dict.fromkeys(("step", "optimizer", "base_step", "base_optimizer"), [1.0, 2.0])
ROW = {**TIMES, "parameters": 1000, "tensors": 10, "peak_bytes": 9}


def linear_loss(model: torch.nn.Module, worker: int, share: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(worker)
    return model(torch.randn(max(1, round(8 * share)), 4, generator=generator)).square().mean()


def linear(base: str, workers: int) -> Workload:
    return Workload("a line", lambda: torch.nn.Linear(4, 3), linear_loss, base, autocasts=True, workers=workers)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and a flat list that take microseconds."""
    for name, workload in {TINY: linear("adamw", 2), FLAT: flat_list(1000, 10)}.items():
        monkeypatch.setitem(WORKLOADS, name, workload)


def bench(names: Sequence[str], chosen: Sequence[str], folder: Path, rounds: int = 2, **more: Any) -> dict[str, Any]:
    """The results that a benchmark leaves in the folder, by workload and method."""
    module.bench(names, chosen, rounds, output_dir=str(folder), device="cpu", **more)
    return json.loads((folder / "bench.json").read_text())["results"]


def need_peer(method: str) -> None:
    if package := {"schedulefree": "schedulefree", "cooper extragradient": "cooper"}.get(method):
        pytest.importorskip(package, reason="needs the peer: pip install hf_extrap[bench]")


@pytest.mark.parametrize("base", ["adamw", "nesterov"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_its_steps(method: str, base: str) -> None:
    need_peer(method)
    made = Made(linear(base, 2), CPU)
    before = float((made.loss(0) + made.loss(1)).detach())
    step, _ = make(method, made)
    for _ in range(5):
        assert 0 <= step() < 10
    assert float(made.loss(0) + made.loss(1)) < before


@pytest.mark.parametrize("same", [("sam", "pytorch_optimizer SAM"), ("base", "none")])
def test_equal_methods_take_equal_steps(same: tuple[str, str]) -> None:
    # With one worker and no momentum, local and global SAM are equal.
    ends = []
    for method in same:
        made = Made(linear("nesterov", 1), CPU)
        step, _ = make(method, made)
        for _ in range(4):
            step()
        ends.append(torch.cat([p.detach().flatten() for p in made.params]))
    torch.testing.assert_close(*ends, rtol=1e-5 if "sam" in same else 0, atol=1e-7 if "sam" in same else 0)


@pytest.mark.parametrize(("name", "counted"), [(FLAT, True), (TINY, False)])
def test_time_of_hooks_counts_for_flat_lists_only(name: str, counted: bool) -> None:
    made = Made(WORKLOADS[name], CPU)
    step, _ = make("base", made)
    step()
    made.params[0].register_hook(lambda _: time.sleep(0.1))
    assert (min(step() for _ in range(3)) >= 0.1) == counted


def test_given_gradients_reach_hooks_and_parameters_without_a_copy() -> None:
    made, seen = Made(WORKLOADS[FLAT], CPU), []
    for p in made.params:
        p.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    for _ in range(2):
        made.backward(0)
        given = [gradient.data_ptr() for gradient in made.gradients]
        assert sorted(seen) == sorted(given) and [p.grad.data_ptr() for p in made.params] == given
        seen.clear()
        made.model.zero_grad()


def test_a_missing_peer_is_measured_once_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_peer("schedulefree")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "schedulefree", None)
        with pytest.raises(NotInstalled, match="schedulefree is not installed; allowed: pip install schedulefree"):
            make("schedulefree", Made(WORKLOADS[TINY], CPU))
        first = bench([FLAT], ["schedulefree"], tmp_path)[FLAT]
    assert "not installed" in first["schedulefree"]["skipped"]
    assert "not installed" in (tmp_path / "bench.md").read_text()
    second = bench([FLAT], ["schedulefree"], tmp_path)[FLAT]
    assert len(second["schedulefree"]["step"]) == 2 and second["base"] == first["base"]
    assert second["schedulefree"]["package"] == f"schedulefree {version('schedulefree')}"


def test_measured_results_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--workloads", f"{TINY},{FLAT}", "--rounds", "2", "--device", "cpu", "--output_dir"]
    assert main([*words, str(tmp_path), "--methods", "extrap-past"]) == 0
    first = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert main([*words, str(tmp_path), "--methods", "extrap-past;past-update"]) == 0
    second = json.loads((tmp_path / "bench.json").read_text())["results"]
    for name in (TINY, FLAT):
        assert set(second[name]) == {"base", "extrap-past", "past-update"}
        assert {m: second[name][m] for m in first[name]} == first[name]
    held = {m: row["peak_bytes"] for m, row in second[FLAT].items()}
    # x next to y, and for local directions the gradient that is the next one: 4 bytes each.
    assert held["past-update"] - held["base"] == pytest.approx(4000, abs=600)
    assert held["extrap-past"] - held["base"] == pytest.approx(8000, abs=600)
    table = (tmp_path / "bench.md").read_text()
    assert "`past-update`" in table and "18 (11)" in table and table in capsys.readouterr().out
    assert (tmp_path / "bench.png").stat().st_size > 5000
    late = [*words, str(tmp_path / "late"), "--methods", "base"]
    assert main([*late, "--minutes", "0"]) == 0
    assert "Time is up before tiny" in capsys.readouterr().out
    assert json.loads((tmp_path / "late" / "bench.json").read_text())["results"][TINY] == {}
    assert main(late) == 0
    assert json.loads((tmp_path / "late" / "bench.json").read_text())["results"][TINY]["base"]["step"]


@pytest.mark.parametrize(("steps", "kept"), [(0, 0), (2 * WARM_UPS + 4, 0), (2 * WARM_UPS + 9, 4), (99, 7)])
def test_time_ends_between_two_steps(
    steps: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The peak takes three steps of each method before the rounds begin.
    taken: list[str] = []
    monkeypatch.setattr(module, "make", lambda method, _: (lambda: taken.append(method) or 1.0, None))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 61.0 * (len(taken) >= 2 * 3 + steps)))
    found = bench([FLAT], ["none"], tmp_path, rounds=7, minutes=1)[FLAT]
    assert [len(row[key]) for row in found.values() for key in ("step", "base_step")] == [kept] * 4 * (kept > 0)
    assert len(taken) == min(2 * 3 + steps, 2 * (3 + WARM_UPS + 7))
    assert (f"Time is up before {FLAT} is done; give it more minutes." in capsys.readouterr().out) == (kept == 0)
    if kept:
        assert f" {kept} " in (tmp_path / "bench.md").read_text(encoding="utf-8").splitlines()[-1]


def test_each_group_of_a_loop_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    row = {"step": [2.0, 4.0], "base_step": [1.0, 2.0], "parameters": 1, "block": 5}

    def run(kinds: Sequence[str], rounds: int, end: float) -> dict[str, Any]:
        calls.append((*kinds, str(rounds)))
        return {kind: row for kind in kinds if len(calls) != 2}

    monkeypatch.setitem(LOOPS, "trainer", SimpleNamespace(run=run, GROUPS=[("base", "none"), ("base", "extrap")]))
    for _ in range(3):
        found = bench(["trainer"], ["base"], tmp_path)
    # Time ended in the second group, with which the second call continues.
    assert calls == [("base", "none", "2"), ("base", "extrap", "2"), ("base", "extrap", "2")]
    assert found["trainer"] == dict.fromkeys(("base", "none", "extrap"), row)
    table = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "2.000 (2.000 … 2.000)" in table and "2 × 5 steps" in table


def test_methods_that_need_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "flat-1e13-10", flat_list(10**13, 10))
    found = bench(["gpt2", "flat-1e13-10"], ["none"], tmp_path / "cpu")
    assert {row["skipped"] for row in found["gpt2"].values()} == {"needs a GPU."}
    assert all(row["skipped"].startswith("needs 480000 GB, and ") for row in found["flat-1e13-10"].values())
    # Large models are measured in pairs.
    groups: list[list[str]] = []
    monkeypatch.setattr(module, "measure", lambda _, __, group, *___: groups.append(group) or dict.fromkeys(group, ROW))
    for workload in ("gpt2", "lstm", "lstm"):
        bench([workload], ["none", "extrap"], tmp_path)
    assert groups == [["base", "none"], ["base", "extrap"], ["base", "none", "extrap"]]


def test_growth_methods_and_parts() -> None:
    results = {}
    for size, tensors in itertools.product((10**6, 10**7, 10**8), (10, 10_000)):
        row = {"parameters": size, "tensors": tensors, "optimizer": [2e-9 * size + 3e-6 * tensors] * 4}
        results[f"flat-{size:.0e}-{tensors}".replace("e+0", "e")] = {"base": row}
    line = growth({"results": results}).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["`base`", "2.00", "3.0", "0 %"]
    assert {"base", *PRESETS, "schedulefree", "pytorch_optimizer SAM", "cooper extragradient"} <= set(METHODS)
    for part, names in PARTS.items():
        assert set(names) <= {*WORKLOADS, *LOOPS} and workloads_of(part) == names
    assert not any(WORKLOADS[name].needs_gpu for name in PARTS["cpu"] if name in WORKLOADS)


def test_wrong_options_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["--workloads", "bert"], "workload is 'bert'; allowed: lstm"),
        (["--methods", "adam"], "method is 'adam'; allowed: base"),
        (["--part", "tpu"], "part is 'tpu'; allowed: cpu, gpu"),
        (["--rounds", "1"], "rounds is 1; allowed"),
    ):
        assert main(["bench", *words, "--device", "cpu", "--output_dir", str(tmp_path)]) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "bench.json").write_text(json.dumps({"machine": {"torch": "0.1"}, "results": {}}))
    with pytest.raises(ValueError, match="holds results of another machine"):
        bench([TINY], ["base"], tmp_path)


@pytest.mark.parametrize("able", [True, False])
def test_precision_is_that_of_the_cpu(able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "cpu_has_bf16", lambda: able)
    seen: list[bool] = []
    model = torch.nn.Linear(4, 3)
    model.forward = lambda **_: seen.append(torch.is_autocast_enabled("cpu")) or SimpleNamespace(loss=0)
    token_loss(2, 3, 9)(model, 0, 1.0)
    assert seen == [able]
    bench([TINY, FLAT], ["base"], tmp_path)
    table = (tmp_path / "bench.md").read_text()
    assert f"a line, {'bf16 autocast' if able else 'float32'}\n" in table
    assert "gradients given, AdamW, float32\n" in table
    monkeypatch.setattr(workloads, "cpu_has_bf16", lambda: not able)
    with pytest.raises(ValueError, match="of another machine or precision .precision was"):
        bench([TINY], ["base"], tmp_path)
