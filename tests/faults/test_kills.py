"""A run that is killed anywhere, any number of times, ends with the weights of the run that was never killed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.killed import ENGINES, Kill, digests, launch
from tests.support.soak import count

KILLS = {
    "one": count(quick=4, soak=25),
    "ddp": count(quick=1, soak=20),
    "uneven": count(quick=0, soak=5),
    "zero1": count(quick=0, soak=25),
    "fsdp2": count(quick=0, soak=25),
}


def kills_of(engine: str, operations: int, seed: int) -> list[Kill]:
    """A random sequence: half of them amid the files of a checkpoint, of all processes or of one alone."""
    choose = random.Random(f"{engine} {seed}")
    ranks = [tuple(range(ENGINES[engine])), *((rank,) for rank in range(ENGINES[engine]))]
    numbers = {"file": operations // 2, "step": 4, "evaluation": 4}
    events = [choose.choice(["file", "file", "step", "evaluation"]) for _ in range(1000)]
    return [Kill(choose.choice(ranks), event, choose.randint(1, numbers[event])) for event in events]


@pytest.mark.parametrize("engine", [engine for engine, kills in KILLS.items() if kills])
def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path, engine: str) -> None:
    assert launch(tmp_path / "whole", engine, None) == [0] * ENGINES[engine]
    expected, operations = digests(tmp_path / "whole", engine)
    killed, events = 0, []
    for life, kill in enumerate(kills_of(engine, operations, seed=0)):
        folder = tmp_path / f"run_{sum(event == 'finished' for event in events)}"
        codes = launch(folder, engine, kill if killed < KILLS[engine] else None)
        assert None not in codes, f"a process hangs after {kill}"
        if any(codes):
            assert any(codes[rank] == -9 for rank in kill.ranks), (life, kill, codes)
            events.append(f"{kill.event} {kill.number} of {kill.ranks}")
            killed += 1
            continue
        events.append("finished")
        assert digests(folder, engine)[0] == expected, events
        # A kill in the last save may leave older checkpoints, which the next save would delete; nothing else is left.
        names = {path.name for path in folder.iterdir()}
        assert "checkpoint-12" in names and all(name.startswith("checkpoint-") for name in names), names
        if killed == KILLS[engine]:
            break
    print(engine, killed, "kills:", ", ".join(events))
    assert killed == KILLS[engine]


@pytest.mark.distributed
def test_a_slow_process_changes_nothing(tmp_path: Path) -> None:
    for name, kill in {"whole": None, "slow": Kill((1,), "slow", 0)}.items():
        assert launch(tmp_path / name, "ddp", kill) == [0, 0]
    assert digests(tmp_path / "slow", "ddp")[0] == digests(tmp_path / "whole", "ddp")[0]
