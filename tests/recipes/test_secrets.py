"""Secrets stay out of run.json, metrics.json, cards, rows of studies, pickled arguments and printed errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_extrap.cli import main
from hf_extrap.recipes.run_folder import plain
from hf_extrap.recipes.secrets import MASK, command_line, is_secret, without_secrets

TOKEN = "hf_" + "Ab3" * 11
PLAIN = "opensesame"


@pytest.mark.parametrize(
    "name", ["hub_token", "--hub-token", "push_to_hub_token", "token", "wandb_api_key", "password"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["batch_tokens", "eos_token", "pad_token_id", "include_num_input_tokens_seen", "secretary", "sacrebleu_signature"],
)
def test_names_of_other_fields(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"its value is {TOKEN}, not 2", f"its value is {MASK}, not 2"),
        (f"--hub_token {PLAIN} --seed 1", f"--hub_token {MASK} --seed 1"),
        (f"hub_token={PLAIN}&x=1", f"hub_token={MASK}&x=1"),
        (json.dumps({"token": PLAIN, "x": 1}), json.dumps({"token": MASK, "x": 1})),
        (f"https://me:{PLAIN}@host/path", f"https://{MASK}@host/path"),
        (f"s3://{PLAIN}@bucket?api_key={PLAIN}", f"s3://{MASK}@bucket?api_key={MASK}"),
        ("--batch_tokens 256, eos_token: </s>, hf_extrap", "--batch_tokens 256, eos_token: </s>, hf_extrap"),
    ],
)
def test_secrets_in_texts(text: str, hidden: str) -> None:
    assert without_secrets(text) == hidden
    assert without_secrets(hidden) == hidden


def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", str(tmp_path / "a.yaml"), "--hub_token", PLAIN, f"--hub-token={PLAIN}", "--batch_tokens", "256"]
    words += ["--data_dir", "/home/someone/corpus", f"--output_dir={tmp_path}/runs/x", f"--optim_args=token={PLAIN}"]
    assert command_line(words) == (
        f"hf-extrap train a.yaml --hub_token {MASK} --hub-token={MASK} --batch_tokens 256 "
        f"--data_dir corpus --output_dir=runs/x --optim_args=token={MASK}"
    )


def test_values_of_json() -> None:
    row = {"hub_token": PLAIN, "token": None, "a": [{"api_key": PLAIN}, f"x {TOKEN}"], "batch_tokens": 4}
    assert plain(row) == {"hub_token": MASK, "token": None, "a": [{"api_key": MASK}, f"x {MASK}"], "batch_tokens": 4}


def test_no_file_of_a_run_holds_its_token(
    tiny_language_model: Path, tmp_path: Path, error_of: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["train", tiny_language_model, "--output_dir", tmp_path / "run", "--max_steps", 3]
    assert main([str(word) for word in [*words, "--hub_token", PLAIN]]) == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"run.json", "metrics.json", "README.md", "training_args.bin", "optimizer.pt"} <= {
        path.name for path in files
    }
    assert [path.name for path in files if PLAIN.encode() in path.read_bytes()] == []
    card = (tmp_path / "run/README.md").read_text()
    assert MASK in card and str(tmp_path) not in card
    # A resume with another token is the same run, and an error shows neither.
    printed = capsys.readouterr()
    error = error_of(*words, "--hub_token", TOKEN, "--seed", 7)
    assert "its seed is 42, not 7" in error or "its seed is None, not 7" in error
    for text in (printed.out, printed.err, error):
        assert PLAIN not in text and TOKEN not in text
    assert error_of("train", "--hub_token", "a", TOKEN) == f"unexpected word '{MASK}': every value follows its --field."
