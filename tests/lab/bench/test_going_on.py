"""A benchmark that continues: skipped methods are tried again, measured ones are not, and time is checked often."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_extrap.lab.bench import bench as module
from hf_extrap.lab.bench.bench import LOOPS, METHODS, PARTS, Loop, bench, workloads_of
from hf_extrap.lab.bench.timing import WARM_UPS, Step
from hf_extrap.lab.bench.workloads import WORKLOADS, Made, flat_list

TINY = "flat-1e3-10"
ROW = {
    **{key: [1.0, 2.0] for key in ("step", "optimizer", "base_step", "base_optimizer")},
    **{"parameters": 1000, "tensors": 10, "peak_bytes": 9},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, TINY, flat_list(1000, 10))


def rows_of(folder: Path, name: str = TINY) -> dict[str, Any]:
    content = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    rows: dict[str, Any] = content["results"][name]
    return rows


def test_a_peer_installed_later_is_measured_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("schedulefree", reason="needs the peer: pip install hf_extrap[bench]")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "schedulefree", None)
        bench([TINY], ["schedulefree"], 2, output_dir=str(tmp_path), device="cpu")
    first = rows_of(tmp_path)
    assert "not installed" in first["schedulefree"]["skipped"]
    bench([TINY], ["schedulefree"], 2, output_dir=str(tmp_path), device="cpu")
    second = rows_of(tmp_path)
    assert len(second["schedulefree"]["step"]) == 2 and second["base"] == first["base"]
    assert second["schedulefree"]["package"] == f"schedulefree {version('schedulefree')}"


@pytest.mark.parametrize(("steps", "kept"), [(0, 0), (2 * WARM_UPS + 4, 0), (2 * WARM_UPS + 9, 4), (99, 7)])
def test_time_ends_between_two_steps(
    steps: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[str] = []

    def counted(method: str, made: Made) -> tuple[Step, object]:
        # The peak takes three steps of each method before the rounds begin.
        return (lambda: taken.append(method) or 1.0), None

    monkeypatch.setattr(module, "make", counted)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 61.0 * (len(taken) >= 2 * 3 + steps)))
    bench([TINY], ["none"], 7, minutes=1, output_dir=str(tmp_path), device="cpu")
    found = rows_of(tmp_path)
    assert [len(row[key]) for row in found.values() for key in ("step", "base_step")] == [kept] * 4 * (kept > 0)
    assert len(taken) == min(2 * 3 + steps, 2 * (3 + WARM_UPS + 7))
    assert (f"Time is up before {TINY} is done; give it more minutes." in capsys.readouterr().out) == (kept == 0)
    if kept:
        assert f" {kept} " in (tmp_path / "bench.md").read_text(encoding="utf-8").splitlines()[-1]


def test_a_later_call_measures_what_time_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "flat-1e2-10"
    monkeypatch.setitem(WORKLOADS, other, flat_list(100, 10))
    clock = iter([0.0] * 2)
    with monkeypatch.context() as short:
        short.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock, 61.0)))
        short.setattr(module, "measure", lambda *_: {"base": ROW})
        bench([TINY, other], ["base"], 2, minutes=1, output_dir=str(tmp_path), device="cpu")
    assert f"Time is up before {other} is done; the same command continues from here." in capsys.readouterr().out
    assert rows_of(tmp_path, other) == {}
    bench([TINY, other], ["base"], 2, output_dir=str(tmp_path), device="cpu")
    assert rows_of(tmp_path) == {"base": ROW} and len(rows_of(tmp_path, other)["base"]["step"]) == 2


def test_the_base_alone_is_a_benchmark_too(tmp_path: Path) -> None:
    bench([TINY], ["base"], 2, output_dir=str(tmp_path), device="cpu")
    assert len(rows_of(tmp_path)["base"]["optimizer"]) == 2


def test_what_is_done_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench([TINY], ["none"], 2, output_dir=str(tmp_path), device="cpu")
    monkeypatch.setattr(module, "measure", lambda *args: pytest.fail("measured again"))
    bench([TINY], ["none"], 2, output_dir=str(tmp_path), device="cpu")


def test_a_loop_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    row = {"step": [2.0, 4.0], "base_step": [1.0, 2.0], "parameters": 1, "block": 5}

    def run(kinds: Sequence[str], rounds: int, end: float) -> dict[str, Any]:
        calls.append((*kinds, str(rounds)))
        return {kind: row for kind in kinds if len(calls) != 2}

    monkeypatch.setitem(LOOPS, "trainer", Loop(run, [("base", "none"), ("base", "extrap")]))
    for _ in range(3):
        bench(["trainer"], ["base"], 2, output_dir=str(tmp_path), device="cpu")
    # Time ended in the second group, which the second call goes on with.
    assert calls == [("base", "none", "2"), ("base", "extrap", "2"), ("base", "extrap", "2")]
    assert rows_of(tmp_path, "trainer") == dict.fromkeys(("base", "none", "extrap"), row)
    table = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "2.000 (2.000 … 2.000)" in table and "2 × 5 steps" in table


def test_methods_that_need_much_memory_are_measured_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[str]] = []

    def measure(name: str, device: object, group: list[str], *_: object) -> dict[str, Any]:
        groups.append(group)
        return dict.fromkeys(group, ROW)

    monkeypatch.setattr(module, "measure", measure)
    for workload in ("gpt2", "lstm", "lstm"):
        bench([workload], ["none", "extrap"], 2, output_dir=str(tmp_path), device="cpu")
    assert groups == [["base", "none"], ["base", "extrap"], ["base", "none", "extrap"]]


def test_a_part_is_made_of_what_there_is() -> None:
    for part, names in PARTS.items():
        assert set(names) <= {*WORKLOADS, *LOOPS} and workloads_of(part) == names
    assert not any(WORKLOADS[name].needs_gpu for name in PARTS["cpu"] if name in WORKLOADS)
    assert {"base", "none"} <= set(METHODS)
