"""A benchmark that goes on: what was skipped is tried again, what is measured is not, and time is looked at often."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from hf_extrap.benchmarks import bench as module
from hf_extrap.benchmarks.bench import LOOPS, METHODS, PARTS, bench, workloads_of
from hf_extrap.benchmarks.workloads import WORKLOADS, _flat

TINY = "flat-1e3-10"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, TINY, _flat(1000, 10))


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


def test_time_is_looked_at_between_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    bench([TINY], ["none", "past-update"], 2, minutes=1, output_dir=str(tmp_path), device="cpu")
    assert set(rows_of(tmp_path)) == {"base", "none"}


def test_the_base_alone_is_a_benchmark_too(tmp_path: Path) -> None:
    bench([TINY], ["base"], 2, output_dir=str(tmp_path), device="cpu")
    assert len(rows_of(tmp_path)["base"]["optimizer"]) == 2


def test_what_is_done_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench([TINY], ["none"], 2, output_dir=str(tmp_path), device="cpu")
    monkeypatch.setattr(module, "_measure", lambda *args: pytest.fail("measured again"))
    bench([TINY], ["none"], 2, output_dir=str(tmp_path), device="cpu")


def test_a_loop_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    row = {"step": [2.0, 4.0], "base_step": [1.0, 2.0], "parameters": 1}
    monkeypatch.setitem(LOOPS, "trainer", lambda rounds: calls.append(rounds) or {"none": row})
    for _ in range(2):
        bench(["trainer"], ["base"], 2, output_dir=str(tmp_path), device="cpu")
    assert calls == [2] and rows_of(tmp_path, "trainer") == {"none": row}
    assert "2.000 (2.000 … 2.000)" in (tmp_path / "bench.md").read_text(encoding="utf-8")


def test_memory_that_is_short_separates_methods() -> None:
    assert module._groups(WORKLOADS["lstm"], ["base", "none", "extrap"]) == [["base", "none", "extrap"]]
    assert module._groups(WORKLOADS["gpt2"], ["none", "extrap"]) == [["base", "none"], ["base", "extrap"]]
    assert module._groups(WORKLOADS["lstm"], []) == module._groups(WORKLOADS["gpt2"], []) == []


def test_a_part_is_made_of_what_there_is() -> None:
    for part, names in PARTS.items():
        assert set(names) <= {*WORKLOADS, *LOOPS} and workloads_of(part) == names
    assert not any(WORKLOADS[name].needs_gpu for name in PARTS["cpu"] if name in WORKLOADS)
    assert {"base", "none"} <= set(METHODS)
