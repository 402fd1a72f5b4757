"""hf-extrap bench: what it compares, how it counts, what it keeps."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_extrap.cli import main
from hf_extrap.lab.bench import methods, workloads
from hf_extrap.lab.bench.bench import bench
from hf_extrap.lab.bench.methods import METHODS, NotInstalled, make
from hf_extrap.lab.bench.report import growth
from hf_extrap.lab.bench.workloads import Made, Workload
from hf_extrap.optim.config import PRESETS

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model and a flat list that take microseconds."""

    def loss(model: torch.nn.Module, worker: int, share: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(worker)
        return model(torch.randn(max(1, round(8 * share)), 4, generator=generator)).square().mean()

    model = Workload("a line", lambda: torch.nn.Linear(4, 3), loss, "adamw", autocasts=True, workers=2)
    for name, workload in {"tiny": model, "tiny-flat": workloads.flat_list(1000, 10)}.items():
        monkeypatch.setitem(workloads.WORKLOADS, name, workload)
    return "tiny"


def test_every_preset_and_every_peer_is_compared() -> None:
    assert {"base", *PRESETS, "schedulefree", "pytorch_optimizer SAM", "cooper extragradient"} <= set(METHODS)


@pytest.mark.parametrize("base", ["adamw", "nesterov"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_its_steps(tiny: str, method: str, base: str) -> None:
    if method == "schedulefree":
        pytest.importorskip("schedulefree", reason="needs the peer: pip install hf_extrap[bench]")
    if method == "cooper extragradient":
        pytest.importorskip("cooper", reason="needs the peer: pip install hf_extrap[bench]")
    workload = workloads.WORKLOADS[tiny]
    made = Made(Workload(workload.title, workload.build, workload.loss, base, workers=2), CPU)
    before = float((made.loss(0) + made.loss(1)).detach())
    step, _ = make(method, made)
    for _ in range(5):
        assert 0 <= step() < 10
    assert float(made.loss(0) + made.loss(1)) < before


def test_peers_of_a_kind_take_the_step_that_ours_takes(tiny: str) -> None:
    # With one worker and no momentum SAM is SAM, whoever wrote it.
    ends = []
    for method in ("sam", "pytorch_optimizer SAM"):
        workload = workloads.WORKLOADS[tiny]
        made = Made(Workload(workload.title, workload.build, workload.loss, "nesterov"), CPU)
        step, _ = make(method, made)
        for _ in range(4):
            step()
        ends.append(torch.cat([p.detach().flatten() for p in made.params]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "counted"), [("tiny-flat", True), ("tiny", False)])
def test_hooks_count_where_there_is_no_pass_but_them(tiny: str, name: str, counted: bool) -> None:
    made = Made(workloads.WORKLOADS[name], CPU)
    step, _ = make("base", made)
    step()
    made.params[0].register_hook(lambda _: time.sleep(0.1))
    assert (min(step() for _ in range(3)) >= 0.1) == counted


def test_given_gradients_reach_hooks_and_parameters_uncopied(tiny: str) -> None:
    made, seen = Made(workloads.WORKLOADS["tiny-flat"], CPU), []
    for p in made.params:
        p.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    for _ in range(2):
        made.backward(0)
        given = [gradient.data_ptr() for gradient in made.gradients]
        assert sorted(seen) == sorted(given) and [p.grad.data_ptr() for p in made.params] == given
        seen.clear()
        made.model.zero_grad()


def test_a_peer_that_is_missing_is_said(tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(methods, "import_module", missing)
    with pytest.raises(NotInstalled, match="schedulefree is not installed; allowed: pip install schedulefree"):
        make("schedulefree", Made(workloads.WORKLOADS[tiny], CPU))
    bench([tiny], ["schedulefree"], 2, output_dir=str(tmp_path), device="cpu")
    assert "not installed" in (tmp_path / "bench.md").read_text()


def test_what_is_measured_is_kept(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        "--workloads",
        "tiny,tiny-flat",
        "--rounds",
        "2",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path),
    ]
    assert main([*words, "--methods", "extrap-past"]) == 0
    first = json.loads((tmp_path / "bench.json").read_text())
    assert main([*words, "--methods", "extrap-past;past-update"]) == 0
    second = json.loads((tmp_path / "bench.json").read_text())
    for name in (tiny, "tiny-flat"):
        assert set(second["results"][name]) == {"base", "extrap-past", "past-update"}
        assert {m: second["results"][name][m] for m in first["results"][name]} == first["results"][name]
    held = {m: row["peak_bytes"] for m, row in second["results"]["tiny-flat"].items()}
    # x beside y, and for local directions the gradient that is the next one: 4 bytes each.
    assert held["past-update"] - held["base"] == pytest.approx(4000, abs=600)
    assert held["extrap-past"] - held["base"] == pytest.approx(8000, abs=600)
    table = (tmp_path / "bench.md").read_text()
    assert "`past-update`" in table and "18 (11)" in table and table in capsys.readouterr().out
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert main([*words[:-1], str(tmp_path / "late"), "--minutes", "0"]) == 0
    assert "Time is up before tiny" in capsys.readouterr().out
    assert json.loads((tmp_path / "late" / "bench.json").read_text())["results"]["tiny"] == {}


def test_growth_is_a_line() -> None:
    results = {
        f"flat-{size:.0e}-{tensors}".replace("e+0", "e"): {
            "base": {"parameters": size, "tensors": tensors, "optimizer": [2e-9 * size + 3e-6 * tensors] * 4}
        }
        for size in (10**6, 10**7, 10**8)
        for tensors in (10, 10_000)
    }
    line = growth({"results": results}).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["`base`", "2.00", "3.0", "0 %"]


def test_wrong_words_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--workloads", "bert"], "workload is 'bert'; allowed: lstm"),
        (["--methods", "adam"], "method is 'adam'; allowed: base"),
        (["--part", "tpu"], "part is 'tpu'; allowed: cpu, gpu"),
        (["--rounds", "1"], "rounds is 1; allowed"),
    ):
        assert main(["bench", *words, "--device", "cpu", "--output_dir", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "bench.json").write_text(json.dumps({"machine": {"torch": "0.1"}, "results": {}}))
    with pytest.raises(ValueError, match="holds results of another machine"):
        bench(["lstm"], ["base"], 2, output_dir=str(tmp_path), device="cpu")


@pytest.mark.parametrize("able", [True, False])
def test_precision_is_that_of_the_cpu_and_is_not_mixed(
    tiny: str, able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "cpu_has_bf16", lambda: able)
    seen: list[bool] = []
    linear = torch.nn.Linear(4, 3)
    linear.forward = lambda **_: seen.append(torch.is_autocast_enabled("cpu")) or SimpleNamespace(loss=0)
    workloads.token_loss(2, 3, 9)(linear, 0, 1.0)
    assert seen == [able]
    bench([tiny, "tiny-flat"], ["base"], 2, output_dir=str(tmp_path), device="cpu")
    table = (tmp_path / "bench.md").read_text()
    assert (
        f"a line, {'bf16 autocast' if able else 'float32'}\n" in table and "gradients given, AdamW, float32\n" in table
    )
    monkeypatch.setattr(workloads, "cpu_has_bf16", lambda: not able)
    with pytest.raises(ValueError, match="of another machine or precision .precision was"):
        bench([tiny], ["base"], 2, output_dir=str(tmp_path), device="cpu")


def test_what_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "flat-1e13-10", workloads.flat_list(10**13, 10))
    bench(["gpt2", "flat-1e13-10"], ["none"], 2, output_dir=str(tmp_path), device="cpu")
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert {row["skipped"] for row in results["gpt2"].values()} == {"needs a GPU."}
    assert all(row["skipped"].startswith("needs 480000 GB, and ") for row in results["flat-1e13-10"].values())
