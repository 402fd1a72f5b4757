"""Every shipped launch configuration starts its engine in real processes; two fall back as doctor warns."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ACCELERATE = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "accelerate").glob("*.yaml"))
PRESETS = {"zero3": "optimistic", "zero3_offload": "optimistic", "fsdp2": "optimistic", "hsdp": "optimistic"}
LOCAL = "extrap-past"
UNTESTED = ["multi_gpu", "two_nodes"]

DDP = {"model": "DistributedDataParallel", "world_size": 2, "stage": None, "mesh": None, "held": 800}
ZERO = {**DDP, "model": "DeepSpeedEngine"}
FSDP = {**DDP, "model": "FSDPGPT2LMHeadModel", "mesh": [2], "held": 400}
EXPECTED: dict[str, dict[str, Any]] = {
    "single_cpu": {**DDP, "model": "GPT2LMHeadModel", "world_size": 1},
    "two_process_cpu": DDP,
    "two_nodes_cpu": DDP,
    "zero0": {**ZERO, "stage": 0, "offload": None},
    "zero1": {**ZERO, "stage": 1, "offload": None},
    "zero2": {**ZERO, "stage": 2, "offload": None},
    "zero2_offload": {**ZERO, "stage": 2, "offload": "cpu"},
    "zero3": {**ZERO, "stage": 3, "held": 400, "offload": None},
    "zero3_offload": {**ZERO, "stage": 3, "held": 400, "offload": "cpu"},
    "fsdp2": FSDP,
    "hsdp": {**FSDP, "world_size": 4, "mesh": [2, 2]},
}


def start(repository: Path, name: str, *words: str | Path, options: tuple[str, ...], **environment: str) -> Any:
    config = str(repository / "configs" / "accelerate" / f"{name}.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *options]
    return subprocess.Popen(
        [*command, "tests/support/launched.py", *map(str, words)],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch_one(repository: Path, folder: Path, name: str, *words: str, **environment: str) -> list[dict[str, Any]]:
    """The report of each process."""
    machines = 2 if name.startswith("two_nodes") else 1
    options: list[tuple[str, ...]] = [("--main_process_port", "0")]
    if machines > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        options = [("--main_process_port", port, "--machine_rank", str(rank)) for rank in range(machines)]
    running = [start(repository, name, folder, *words, options=each, **environment) for each in options]
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-4000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]


#: Launched by make test; the tests of each engine form process groups of the others.
DEFAULT = ("zero2_offload",)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.matrix) for name in EXPECTED]
)
def test_a_configuration_launches_its_engine(repository: Path, tmp_path: Path, name: str) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    forced = ["force_fsdp"] if name in ("fsdp2", "hsdp") else []
    ranks = launch_one(repository, tmp_path, name, PRESETS.get(name, LOCAL), *forced)
    assert len(ranks) == EXPECTED[name]["world_size"]
    for rank in ranks:
        assert {key: rank[key] for key in EXPECTED[name]} == EXPECTED[name]
        assert rank["losses"] == ranks[0]["losses"] and rank["losses"][-1] < rank["losses"][0] - 0.3


@pytest.mark.distributed
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "environment"),
    [("fsdp2", {}), ("zero2", {"ACCELERATE_USE_CPU": "true"})],
    ids=["fsdp2", "zero2"],
)
def test_the_fallback_to_ddp_on_a_cpu(repository: Path, tmp_path: Path, name: str, environment: dict[str, str]) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    ranks = launch_one(repository, tmp_path, name, "none", **environment)
    assert [rank["model"] for rank in ranks] == ["DistributedDataParallel"] * 2


def test_each_configuration_is_launched_or_marked_untested(repository: Path) -> None:
    assert {*EXPECTED, *UNTESTED} == set(ACCELERATE)
    for name in UNTESTED:
        first = (repository / "configs" / "accelerate" / f"{name}.yaml").read_text().splitlines()[0]
        assert first.startswith("# Untested"), name
    used = set()
    for name in EXPECTED:
        fields = yaml.safe_load((repository / "configs" / "accelerate" / f"{name}.yaml").read_text())
        if "deepspeed_config" in fields:
            used.add(fields["deepspeed_config"]["deepspeed_config_file"])
    shipped = {str(path.relative_to(repository)) for path in (repository / "configs" / "deepspeed").glob("*.json")}
    assert used == shipped and len(used) == 6
