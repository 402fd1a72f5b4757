"""The recorder of a run: time per step, and its share of waiting for data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from hf_extrap.recipes.recording import RunRecorder
from hf_extrap.recipes.run_folder import RunFolder


def recorded(tmp_path: Path, events: list[tuple[float, str]], monkeypatch: pytest.MonkeyPatch) -> RunRecorder:
    """A recorder after these events, each at its second."""
    recorder = RunRecorder(RunFolder(tmp_path))
    state, control = TrainerState(max_steps=5), TrainerControl()
    for second, event in events:
        monkeypatch.setattr("time.perf_counter", lambda second=second: second)
        state.global_step += event == "step_end"
        getattr(recorder, f"on_{event}")(SimpleNamespace(), state, control)
    return recorder


TIMES = (10.0, 14.0, 14.5, 16.5, 17.5, 19.5)
STEPS: list[tuple[float, Any]] = list(zip(TIMES, ("step_begin", "step_end") * 3, strict=True))


def test_a_step_is_timed_with_its_wait_from_the_second_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(tmp_path, [*STEPS, (20.0, "step_begin"), (22.0, "step_end")], monkeypatch)
    assert recorder.intervals == [4.5, 3.0, 2.5] and recorder.waits == [0.5, 1.0, 0.5]
    assert recorder.seconds_per_step == 2.75
    assert recorder.data_seconds_per_step == pytest.approx(2 / 3)
    recorder = recorded(tmp_path, STEPS[:2], monkeypatch)
    assert recorder.seconds_per_step is None and recorder.data_seconds_per_step is None


@pytest.mark.parametrize(
    ("event", "intervals"), [("log", [4.5, 3.0, 9.5]), ("evaluate", [4.5, 3.0]), ("save", [4.5, 3.0])]
)
def test_waits_and_events(tmp_path: Path, event: str, intervals: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(tmp_path, [*STEPS, (20.0, event), (27.0, "step_begin"), (28.0, "step_end")], monkeypatch)
    assert recorder.waits == [0.5, 1.0] and recorder.intervals == intervals
