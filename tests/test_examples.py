"""Every example runs, reduces its loss, and is short."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import GradientState

Launch = Callable[..., str]


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"\d+\.\d+", text)]


@pytest.fixture
def run_here(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[float]]:
    """Runs an example in this process, which has the libraries already; the numbers in its last line."""

    def run(name: str, *words: str) -> list[float]:
        # Other tests of this process may have left a step of gradient accumulation unfinished.
        GradientState._reset_state()
        monkeypatch.setattr("sys.argv", [name, *words])
        runpy.run_path(str(repository / "examples" / name), run_name="__main__")
        return numbers(capsys.readouterr().out.splitlines()[-1])

    return run


def test_the_plain_loop(run_here: Callable[..., list[float]], tmp_path: Path) -> None:
    words = ("--steps", "30", "--state", str(tmp_path / "state"))
    first, last = run_here("plain_loop.py", *words)
    # A uniform guess among 256 bytes has a loss of 5.5.
    assert 5 < first < 6 and last < first - 1
    # Again, from the saved state.
    first, _ = run_here("plain_loop.py", *words)
    assert first < last + 0.5


@pytest.mark.distributed
def test_the_plain_loop_in_two_processes(launch: Launch) -> None:
    first, last = numbers(launch("examples/plain_loop.py", "--steps", "30"))
    assert 5 < first < 6 and last < first - 1


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "preset"), [("3", "extragradient"), pytest.param("2", "extrap", marks=pytest.mark.matrix)]
)
def test_the_deepspeed_loop(launch: Launch, stage: str, preset: str) -> None:
    pytest.importorskip("deepspeed")
    words = ("examples/deepspeed_loop.py", "--stage", stage, "--preset", preset, "--steps", "20")
    printed = launch(*words)
    assert f"DeepSpeedEngine, stage {stage}, 2 processes" in printed
    first, last = numbers(printed.splitlines()[-1])
    assert 5 < first < 6 and last < first - 1


def test_the_trainer_script(run_here: Callable[..., list[float]]) -> None:
    (perplexity,) = run_here("trainer_script.py", "--max_steps", "10")
    assert perplexity < 128


def test_the_full_batch(run_here: Callable[..., list[float]]) -> None:
    words = ("--rates", "0.23", "--seeds", "1", "--methods")
    plain = run_here("full_batch.py", *words, "none")
    past = run_here("full_batch.py", *words, "extrap-past, a fifth of the step")
    # Steps, gradients, rate: at a rate too large for the base optimizer, extrapolation trains.
    assert past[0] == past[1] < 70 and past[0] < 0.8 * plain[0]


@pytest.mark.matrix
def test_the_stability_limits(run_here: Callable[..., list[float]]) -> None:
    found = run_here("stability.py")
    # Extrapolation by c times the last step divides the heavy ball's largest rate by 1 + 2c.
    for c, factor in zip(found[::2], found[1::2], strict=True):
        assert factor == pytest.approx(1 / (1 + 2 * c), abs=0.03)


def test_trl(run_here: Callable[..., list[float]]) -> None:
    pytest.importorskip("trl")
    first, last = run_here("trl_sft.py", "--max_steps", "10")
    assert last < first - 0.2


def test_every_example_has_under_a_hundred_lines(repository: Path) -> None:
    for path in (repository / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < 100, path.name
