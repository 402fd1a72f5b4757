"""hf-extrap generate and hf-extrap predict: what they read, print and refuse."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_extrap.cli import main


def test_texts_from_words_and_from_the_standard_input(
    task_runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(task_runs / "language_modeling")

    def printed(*words: str, given: str = "") -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        capsys.readouterr()
        assert main(["generate", run, *words, "--max_new_tokens", "4"]) == 0
        return capsys.readouterr().out.splitlines()

    lines = printed("the value", "a")
    assert len(lines) == 2 and lines[0].startswith("the value ") and lines[1].startswith("a ")
    assert printed(given="the value\na\n") == printed("-", given="the value\na") == lines
    assert printed(given="") == []
    drawn = printed("the", "--do_sample", "--temperature", "3", "--seed", "3")
    assert drawn == printed("the", "--do_sample", "--temperature", "3", "--seed", "3") != printed("the")


def test_labels_and_probabilities(task_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, image = str(task_runs / "image_classification"), str(tmp_path / "image.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(image)
    capsys.readouterr()
    assert main(["predict", run, image, image, "--top_k", "3"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [image] * 6 and rows[:3] == rows[3:]
    shares = [float(row[2]) for row in rows[:3]]
    assert shares == sorted(shares, reverse=True) and 0.1 < shares[0] < 1
    assert main(["predict", run, image, "--json", "--top_k", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["image"] == image and [one["label"] for one in found["predictions"]] == [row[1] for row in rows[:3]]


def test_what_is_refused(task_runs: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    run = task_runs / "language_modeling"
    assert error_of("generate", tmp_path / "no", "x") == f"checkpoint {tmp_path / 'no'} does not exist."
    assert error_of("generate", run, "x", "--num_beams", 0) == "`num_beams` is 0; allowed: at least 1."
    assert error_of("generate", run, "x", "--top_p", 0.5) == "`top_p` is 0.5; allowed: only with `do_sample`."
    assert "allowed: an image classifier, or hf-extrap generate." in error_of("predict", run, "x.png")
