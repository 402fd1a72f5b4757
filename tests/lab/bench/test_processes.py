"""Two processes: what they send beside plain DistributedDataParallel is counted."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_extrap.cli import main
from hf_extrap.lab.bench import processes
from hf_extrap.lab.bench.methods import EXTRA_ALL_REDUCES

SAID = """
{0}Traceback (most recent call last):
{0}  File "processes.py", line 3, in <module>
{0}RuntimeError: gloo has no interface
E1126 failed (exitcode: 1) local_rank: 0 (pid: 17)
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (SAID.format(""), "RuntimeError: gloo has no interface"),
        (SAID.format("[rank1]: "), "RuntimeError: gloo has no interface"),
        ("x.errors.ChildFailedError: \n  traceback : Signal 9 (SIGKILL) received by PID 17\n==", "Signal 9 (SIGKILL)"),
        ("python: No module named torch\n", "python: No module named torch"),
        ("", "no message"),
    ],
)
def test_a_failure_is_a_sentence(
    said: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = SimpleNamespace(returncode=1, stderr=said)
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    assert main(["bench", "--workloads", "processes", "--device", "cpu", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"hf-extrap: error: the benchmark of two processes failed: {reason}.\n"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.matrix
def test_local_directions_send_nothing_more_and_global_fresh_ones_a_gradient() -> None:
    kinds = list(dict.fromkeys(kind for group in processes.GROUPS for kind in group))
    found = processes.run(kinds, 2, math.inf, "translation")
    assert list(found) == kinds
    for kind, row in found.items():
        assert len(row["step"]) == len(row["base_step"]) == 2
        # Beside gradients there are flags and norms alone.
        averagings = row["extra_bytes_sent"] / (4 * row["parameters"])
        assert averagings == pytest.approx(EXTRA_ALL_REDUCES.get(kind, 0), abs=0.01)


@pytest.mark.distributed
@pytest.mark.matrix
def test_both_processes_end_when_time_does() -> None:
    assert processes.run(("base", "none"), 10**6, time.monotonic() + 1, "translation") == {}
