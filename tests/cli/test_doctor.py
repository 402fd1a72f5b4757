"""The doctor says what is so on this machine, and what would be so on others."""

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
from hf_extrap.cli.doctor import (
    TESTED,
    Machine,
    devices,
    engines,
    judge,
    print_report,
    shipped,
    this_machine,
    untested_versions,
)

CPU = Machine(versions=TESTED, compilers=frozenset({"g++", "ninja"}))
GPUS = dataclasses.replace(CPU, gpus=2, bf16_gpus=True, backends=frozenset({"gloo", "nccl"}))
FOUR_GPUS = dataclasses.replace(GPUS, gpus=4)
ON_A_CPU = {"single_cpu", "two_process_cpu", "two_nodes_cpu"}
ZERO = {"zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}


@pytest.fixture(autouse=True)
def in_the_checkout(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


def test_engines_agree_with_what_torch_sees() -> None:
    found = {engine.name: engine for engine in engines(this_machine())}
    assert found["one process"].obstacle is None
    assert (found["DDP, gloo (CPU)"].obstacle is None) == dist.is_gloo_available()
    assert (found["DDP, nccl (GPU)"].obstacle is None) == (torch.cuda.device_count() > 1)
    assert not dist.is_initialized()


def test_the_report_names_versions_devices_and_reasons() -> None:
    text = io.StringIO()
    machine = dataclasses.replace(CPU, environment={"DS_ACCELERATOR": "cpu"})
    verdicts = [judge(path, machine) for path in shipped()]
    print_report(machine, verdicts, Console(file=text, width=250))
    report = text.getvalue()
    assert torch.__version__ in report and "DS_ACCELERATOR=cpu" in report
    assert all(name in report for name, _ in devices())
    for engine in engines(machine):
        assert engine.name in report
        assert engine.obstacle is None or engine.obstacle in report
    for verdict in verdicts:
        assert verdict.name in report and all(sentence in report for sentence in verdict.obstacles)


def test_the_tested_versions_are_those_of_the_constraints(repository: Path) -> None:
    pinned = dict(line.split("==") for line in (repository / "constraints.txt").read_text().split())
    assert all(pinned.get(name, version) == version for name, version in TESTED.items())
    assert untested_versions(dataclasses.replace(CPU, versions={**TESTED, "torch": "2.13.0+cpu"})) == []
    other = untested_versions(dataclasses.replace(CPU, versions={**TESTED, "torch": "2.12.0+cpu"}))
    assert other == ["torch is 2.12.0+cpu; tested with 2.13.0."]


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (CPU, ON_A_CPU | ZERO),
        (dataclasses.replace(CPU, versions={}), ON_A_CPU),
        (dataclasses.replace(CPU, deepspeed_error="no module"), ON_A_CPU),
        (dataclasses.replace(CPU, compilers=frozenset({"g++"})), ON_A_CPU),
        (dataclasses.replace(CPU, backends=frozenset()), {"single_cpu", "two_nodes_cpu"}),
        (GPUS, ON_A_CPU | ZERO | {"multi_gpu", "fsdp2", "two_nodes"}),
        (dataclasses.replace(GPUS, gpus=1), ON_A_CPU),
        (FOUR_GPUS, ON_A_CPU | ZERO | {"multi_gpu", "fsdp2", "two_nodes", "hsdp"}),
        (dataclasses.replace(CPU, environment={"ACCELERATE_USE_CPU": "true"}), ON_A_CPU),
    ],
    ids=["cpu", "no deepspeed", "broken", "no ninja", "no gloo", "2 gpus", "1 gpu", "4 gpus", "ACCELERATE_USE_CPU"],
)
def test_which_launches_a_machine_can_make(machine: Machine, expected: set[str]) -> None:
    launches = [path for path in shipped() if path.parent.name == "accelerate"]
    found = {path.stem for path in launches if judge(path, machine).can_run}
    assert found == expected


def accelerate(**fields: Any) -> dict[str, Any]:
    return {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 2, "use_cpu": False, **fields}


DEEPSPEED = {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True}


@pytest.mark.parametrize(
    ("fields", "machine", "said"),
    [
        (accelerate(distributed_type="MULTI_CPU", use_cpu=True), CPU, "starts one process"),
        (accelerate(distributed_type="NO", use_cpu=True), CPU, "one process of the 2"),
        (accelerate(distributed_type="FSDP", use_cpu=True), GPUS, "runs DDP without a word"),
        (accelerate(distributed_type="TPU"), GPUS, "distributed_type is TPU"),
        (accelerate(num_processes=3, num_machines=2, use_cpu=True), CPU, "does not divide over 2"),
        (accelerate(use_cpu=True, mixed_precision="fp16"), CPU, "needs a GPU"),
        (accelerate(mixed_precision="bf16"), dataclasses.replace(GPUS, bf16_gpus=False), "do not compute in"),
        (accelerate(), dataclasses.replace(GPUS, backends=frozenset({"gloo"})), "without nccl"),
        (accelerate(distributed_type="FSDP", parallelism_config={"dp_shard_size": 4}), GPUS, "multiply to 4"),
        ({**DEEPSPEED, "zero_allow_untested_optimizer": False}, CPU, "lacks zero_allow_untested_optimizer"),
        ({**DEEPSPEED, "fp16": {"enabled": True}}, CPU, "refuses on a CPU"),
        (
            {**DEEPSPEED, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            CPU,
            "zero_force_ds_cpu_optimizer: false",
        ),
        ({"task": "translation", "fp16": True}, CPU, "needs a GPU"),
        ({"task": "language_modeling", "bf16": True}, CPU, "no LSTM in bf16"),
        ({"task": "translation", "deepspeed": "nowhere.json"}, CPU, "nowhere.json does not exist"),
    ],
)
def test_what_speaks_against_a_configuration(
    tmp_path: Path, fields: dict[str, Any], machine: Machine, said: str
) -> None:
    path = tmp_path / ("given.json" if "zero_optimization" in fields else "given.yaml")
    path.write_text(json.dumps(fields) if path.suffix == ".json" else yaml.safe_dump(fields))
    verdict = judge(path, machine)
    assert len(verdict.obstacles) == 1 and said in verdict.obstacles[0]


@pytest.mark.parametrize(
    ("fields", "instead"),
    [
        ({"task": "translation", "bf16": True}, "--bf16 false"),
        ({"task": "language_modeling", "model_type": "gpt2", "bf16": True}, "--bf16 false"),
        (accelerate(use_cpu=True, mixed_precision="bf16"), "mixed_precision: 'no'"),
        ({**DEEPSPEED, "bf16": {"enabled": True}}, "bf16 enabled: false"),
    ],
)
def test_bf16_on_a_cpu_without_it_is_a_note(tmp_path: Path, fields: dict[str, Any], instead: str) -> None:
    path = tmp_path / ("given.json" if "zero_optimization" in fields else "given.yaml")
    path.write_text(json.dumps(fields) if path.suffix == ".json" else yaml.safe_dump(fields))
    verdict, able = judge(path, CPU), judge(path, dataclasses.replace(CPU, bf16_cpu=True))
    slow = [note for note in verdict.notes if "several times slower" in note]
    assert verdict.can_run and len(slow) == 1 and instead in slow[0]
    assert [note for note in verdict.notes if note not in slow] == able.notes


@pytest.mark.parametrize("there", [True, False])
def test_without_onednn_a_cpu_has_no_bf16(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: there)
    seen = there and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert this_machine().bf16_cpu == seen
    assert devices()[0][1].endswith("bf16" if seen else "bf16 emulated")


def test_the_exit_code_is_that_of_the_given_configurations(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_extrap.cli.doctor.this_machine", lambda: CPU)
    good = str(repository / "configs" / "accelerate" / "two_process_cpu.yaml")
    assert main(["doctor", good]) == 0
    assert main(["doctor", good, "configs/accelerate/multi_gpu.yaml", "--json"]) == 1
    printed = capsys.readouterr().out
    content = json.loads(printed[printed.index("{") :])
    assert [row["can_run"] for row in content["configurations"]] == [True, False]
    assert "2 GPUs" in content["configurations"][1]["obstacles"][0]
    assert main(["doctor"]) == 0
    assert main(["doctor", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml does not exist" in capsys.readouterr().err
