"""The measurement of what a manifest costs runs, on a small checkpoint."""

from __future__ import annotations

import pytest

from hf_extrap.lab.verification import main


def test_a_small_checkpoint_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["verification", "--parameters", "2000000", "--rounds", "1"])
    main()
    printed = capsys.readouterr().out
    assert all(f"| {step} " in printed for step in ("save", "manifest and fsync", "verify", "load"))
    # Weights, and two moments of each: 24 MB.
    assert "0.02 GB, median of 1; verify / load " in printed
