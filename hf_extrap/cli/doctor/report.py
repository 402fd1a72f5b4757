"""The doctor's report, as tables or JSON."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from accelerate.commands.env import env_command
from rich.console import Console

from hf_extrap.recipes.precision import cpu_has_bf16
from hf_extrap.recipes.tables import make_table
from hf_extrap.training.versions import versions

from .configurations import Verdict
from .machine import LAUNCH_VARIABLES, Machine

TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0", "deepspeed": "0.19.8"}
"""The releases that the tests run with."""


def content(machine: Machine, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The report as JSON values; `devices` is what `accelerate env` says, with the CPU's support of bfloat16."""
    with contextlib.redirect_stdout(io.StringIO()):
        devices = env_command(argparse.Namespace(config_file=None))
    installed = {d.name: d.version for d in metadata.distributions() if d.name == "deepspeed"}
    found = {**versions(), "deepspeed": "not installed", **installed}
    return {
        "versions": found,
        "untested_versions": untested_versions(found),
        "devices": {**devices, "GPUs": str(machine.gpus), "CPU": "bf16" if cpu_has_bf16() else "bf16 emulated"},
        "engines": engines(machine),
        "environment": dict(machine.environment),
        "configurations": [{**asdict(verdict), "can_run": not verdict.obstacles} for verdict in verdicts],
    }


def untested_versions(found: Mapping[str, str]) -> list[str]:
    """One sentence for each library whose release differs from the tested one."""
    # A local label such as +cpu names the build, not the release.
    return [
        f"{name} is {found[name]}; tested with {release}."
        for name, release in TESTED.items()
        if found[name].split("+")[0] not in (release, "not installed")
    ]


def engines(machine: Machine) -> list[dict[str, Any]]:
    """Every engine: `name`, `can_run`, the `obstacle` if it cannot run here, and the supported `extrapolation`."""
    gloo = None if "gloo" in machine.backends else "gloo does not start"
    nccl = None if "nccl" in machine.backends else "PyTorch was built without nccl"
    two = None if machine.gpus > 1 else f"needs two GPUs, and there are {machine.gpus} here"
    every, sharded = "all directions, virtual workers", "global directions, noise"
    rows = [
        ("one process", None, every),
        ("DDP, gloo (CPU)", gloo, every),
        ("DDP, nccl (GPU)", two or nccl, every),
        ("DeepSpeed, ZeRO 0 to 2", machine.no_deepspeed, every),
        ("DeepSpeed, ZeRO 3", machine.no_deepspeed, sharded),
        ("FSDP2", two or nccl, sharded),
    ]
    return [{"name": n, "can_run": o is None, "obstacle": o, "extrapolation": e} for n, o, e in rows]


def print_tables(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the report as tables."""
    console = console or Console()
    for title in ("versions", "devices"):
        rows = [[name, str(value)] for name, value in content[title].items()]
        console.print(make_table(title.capitalize(), ["", ""], rows, header=False))
    for sentence in content["untested_versions"]:
        console.print(sentence)
    rows = [
        [each["name"], "yes" if each["can_run"] else f"no: {each['obstacle']}", each["extrapolation"]]
        for each in content["engines"]
    ]
    console.print(make_table("Engines", ["engine", "can run here", "extrapolation"], rows, numbers=False))
    if rows := [[f"{name}={value}", LAUNCH_VARIABLES[name]] for name, value in content["environment"].items()]:
        console.print(make_table("Environment", ["variable", "what it sets"], rows, numbers=False))
    rows = [
        [each["name"], each["starts"], "yes" if each["can_run"] else "no", " ".join(each["obstacles"] + each["notes"])]
        for each in content["configurations"]
    ]
    head = ["configuration", "starts", "can run here", "obstacles and notes"]
    console.print(make_table("Configurations", head, rows, numbers=False))
