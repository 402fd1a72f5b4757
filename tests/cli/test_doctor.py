"""`hf-extrap doctor` on this machine, and on others that have GPUs or lack libraries."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from rich.console import Console

from hf_extrap.cli import main
from hf_extrap.cli.doctor import machine as module
from hf_extrap.cli.doctor.configurations import judge, shipped
from hf_extrap.cli.doctor.machine import Machine, this_machine
from hf_extrap.cli.doctor.report import TESTED, content, print_tables, untested_versions

CPU = Machine()
GPUS = Machine(gpus=2, backends=frozenset({"gloo", "nccl"}))
ON_A_CPU = {"single_cpu", "two_process_cpu", "two_nodes_cpu"}
ZERO = {"zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}


@pytest.fixture(autouse=True)
def in_the_checkout(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


def test_the_report_names_versions_devices_and_reasons(repository: Path) -> None:
    machine = dataclasses.replace(this_machine(), environment={"DS_ACCELERATOR": "cpu"})
    assert not dist.is_initialized()
    found = content(machine, [judge(path, machine) for path in shipped()])
    can_run = {engine["name"]: engine["can_run"] for engine in found["engines"]}
    assert can_run["one process"] and can_run["DDP, gloo (CPU)"] == dist.is_gloo_available()
    assert can_run["DDP, nccl (GPU)"] == (torch.cuda.device_count() > 1)
    print_tables(found, Console(file=(text := io.StringIO()), width=250))
    report = text.getvalue()
    assert torch.__version__ in report and "DS_ACCELERATOR=cpu" in report and len(found["configurations"]) == 19
    for verdict in found["configurations"]:
        assert all(sentence in report for sentence in (verdict["name"], verdict["starts"], *verdict["obstacles"]))
    pinned = dict(line.split("==") for line in (repository / "constraints.txt").read_text().split())
    assert all(pinned.get(name, version) == version for name, version in TESTED.items())
    assert untested_versions({**TESTED, "torch": "2.13.0+cpu", "deepspeed": "not installed"}) == []
    assert untested_versions({**TESTED, "torch": "2.12.0+cpu"}) == ["torch is 2.12.0+cpu; tested with 2.13.0."]


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (CPU, ON_A_CPU | ZERO),
        (Machine(no_deepspeed="DeepSpeed is not installed."), ON_A_CPU),
        (Machine(backends=frozenset()), {"single_cpu"}),
        (GPUS, ON_A_CPU | ZERO | {"multi_gpu", "fsdp2", "two_nodes"}),
        (dataclasses.replace(GPUS, gpus=1), ON_A_CPU),
        (dataclasses.replace(GPUS, gpus=4), ON_A_CPU | ZERO | {"multi_gpu", "fsdp2", "two_nodes", "hsdp"}),
        (Machine(environment={"ACCELERATE_USE_CPU": "true"}), ON_A_CPU),
        (dataclasses.replace(GPUS, gpus=1, environment={"DS_ACCELERATOR": "cpu"}), ON_A_CPU | ZERO),
    ],
    ids=["cpu", "no deepspeed", "no gloo", "2 gpus", "1 gpu", "4 gpus", "ACCELERATE_USE_CPU", "DS_ACCELERATOR"],
)
def test_which_launches_a_machine_can_make(machine: Machine, expected: set[str]) -> None:
    launches = [path for path in shipped() if path.parent.name == "accelerate"]
    assert {path.stem for path in launches if not judge(path, machine).obstacles} == expected


def test_why_deepspeed_and_bf16_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, reason in (
        ("deepspeed", "DeepSpeed is not installed"),
        ("ninja", "builds an extension for the CPU with ninja, not on PATH"),
    ):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name, no=missing: None if name == no else name)
        monkeypatch.setattr(module.shutil, "which", lambda name, no=missing: None if name == no else name)
        assert reason in str(this_machine().no_deepspeed)
    for there in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda there=there: there)
        able = there and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert content(CPU, [])["devices"]["CPU"] == ("bf16" if able else "bf16 emulated")


def accelerate(**fields: Any) -> dict[str, Any]:
    return {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 2, "use_cpu": False, **fields}


DEEPSPEED = {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("fields", "machine", "reason"),
    [
        (accelerate(distributed_type="MULTI_CPU", use_cpu=True), CPU, "starts one process"),
        (accelerate(distributed_type="NO", use_cpu=True), CPU, "one process of the 2"),
        (accelerate(distributed_type="FSDP", use_cpu=True), GPUS, "runs DDP instead"),
        (accelerate(distributed_type="XLA"), GPUS, "distributed_type XLA is not supported"),
        (accelerate(distributed_type="CPUS"), GPUS, "'CPUS' is not a valid DistributedType"),
        (accelerate(num_procs=3), GPUS, "unknown keys (['num_procs'])"),
        (accelerate(num_processes=3, num_machines=2, use_cpu=True), CPU, "a multiple of num_machines, which is 2"),
        (accelerate(), dataclasses.replace(GPUS, backends=frozenset({"gloo"})), "without nccl"),
        ({**DEEPSPEED, "zero_allow_untested_optimizer": False}, CPU, "lacks zero_allow_untested_optimizer"),
        ({**DEEPSPEED, "zero_optimization": OFFLOAD}, CPU, "zero_force_ds_cpu_optimizer: false"),
        ({"task": "translation", "extrap_step_ratio": -1.0, "extrap": "extrap"}, CPU, "step_ratio is -1.0"),
        ({"task": "translation", "deepspeed": "nowhere.json"}, CPU, "nowhere.json"),
        ({"learning_rate": 1.0}, CPU, "not a configuration of accelerate, DeepSpeed or this package"),
    ],
)
def test_refused_configurations(tmp_path: Path, fields: dict[str, Any], machine: Machine, reason: str) -> None:
    path = tmp_path / ("given.json" if "zero_optimization" in fields else "given.yaml")
    path.write_text(json.dumps(fields) if path.suffix == ".json" else yaml.safe_dump(fields))
    (sentence,) = judge(path, machine).obstacles
    assert reason in sentence


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "this_machine", lambda: CPU)
    good = "configs/accelerate/two_process_cpu.yaml"
    assert main(["doctor", good]) == 0
    assert "2 GPUs" not in capsys.readouterr().out
    assert main(["doctor", good, "configs/accelerate/multi_gpu.yaml", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["configurations"]
    assert [row["can_run"] for row in rows] == [True, False] and "2 GPUs" in rows[1]["obstacles"][0]
    assert main(["doctor"]) == 0
    assert main(["doctor", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml does not exist" in capsys.readouterr().err
