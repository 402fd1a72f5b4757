"""The doctor says what is so on this machine."""

from __future__ import annotations

import io

import torch
import torch.distributed as dist
from rich.console import Console

from hf_extrap.doctor import devices, engines, print_report


def test_engines_agree_with_what_torch_sees() -> None:
    found = {engine.name: engine for engine in engines()}
    assert found["one process"].obstacle is None
    assert (found["DDP, gloo (CPU)"].obstacle is None) == dist.is_gloo_available()
    assert (found["DDP, nccl (GPU)"].obstacle is None) == (torch.cuda.device_count() > 1)
    assert not dist.is_initialized()


def test_the_report_names_versions_devices_and_reasons() -> None:
    text = io.StringIO()
    print_report(Console(file=text, width=140))
    report = text.getvalue()
    assert torch.__version__ in report
    assert all(name in report for name, _ in devices())
    for engine in engines():
        assert engine.name in report
        assert engine.obstacle is None or engine.obstacle in report
