"""Two processes: what they send beside plain DistributedDataParallel is counted."""

from __future__ import annotations

import pytest

from hf_extrap.benchmarks import processes
from hf_extrap.benchmarks.methods import EXTRA_ALL_REDUCES


@pytest.mark.slow
@pytest.mark.distributed
def test_local_directions_send_nothing_more_and_global_fresh_ones_a_gradient() -> None:
    found = processes.run(2, "translation")
    assert list(found) == list(processes.KINDS)
    for kind, row in found.items():
        assert len(row["step"]) == len(row["base_step"]) == 2
        # Beside gradients there are flags and norms alone.
        averagings = row["extra_bytes_sent"] / (4 * row["parameters"])
        assert averagings == pytest.approx(EXTRA_ALL_REDUCES.get(kind, 0), abs=0.01)
