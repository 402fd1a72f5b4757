"""The page of runs: which rows it shows, what it advises, who may see it, and how it looks in a browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from hf_extrap.cli import main
from hf_extrap.lab.watch.advice import advice
from hf_extrap.lab.watch.runs import find_runs
from hf_extrap.recipes.run_folder import RunFolder


def row(step: int, **fields: float) -> dict[str, Any]:
    return {"loss": 5.0 - step / 10, "extrap/loss_at_y": 5.0 - step / 10, "step": step, **fields}


def evaluation(step: int) -> dict[str, Any]:
    return {"eval_loss": 4.0, "eval_perplexity": 55.0, "eval_extrap/loss_at_x": 4.1, "eval_runtime": 3.0, "step": step}


NOISY = {"extrap/gradient_noise_scale": 96.0, "extrap/batch_size": 32.0, "steps_per_second": 2.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one finished, one that has logged a row."""
    root = tmp_path_factory.mktemp("runs")
    RunFolder(root / "plain").write_history([row(1), row(2, **NOISY), evaluation(2), {"train_runtime": 9.0, "step": 2}])
    RunFolder(root / "plain").write_configuration({"arguments": {"extrap": "none"}})
    RunFolder(root / "deep" / "past").write_history([row(1)])
    return root


def test_runs_are_found_below_a_folder_and_read_row_by_row(runs: Path, tmp_path: Path) -> None:
    assert [run.name for run in find_runs([runs])] == ["deep/past", "plain"]
    assert [run.name for run in find_runs([runs / "plain", runs / "deep"])] == ["plain", "deep/past"]
    folder = RunFolder(tmp_path / "run")
    folder.write_history([row(1)])
    (run,) = find_runs([tmp_path])
    assert [new["step"] for new in run.new_rows()] == [1] and run.new_rows() == []
    folder.write_history([row(1), row(2), row(3)])
    assert [new["step"] for new in run.new_rows()] == [2, 3]
    # A resume logs steps again that are known.
    folder.write_history([row(1), row(2)])
    assert run.new_rows() == []
    folder.write_history([row(1), row(2), row(3), row(4)])
    assert [new["step"] for new in run.new_rows()] == [4] and run.arguments() == {}


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [
        # Steps are proportional to 1 + N / B: (1 + 96 / 64) / (1 + 96 / 32) = 0.625.
        (96.0, "Gradient noise scale 96, batch 32: a larger batch pays, twice the batch takes about 0.62 times"),
        (
            8.0,
            "Gradient noise scale 8, batch 32: a larger batch saves few steps, twice the batch takes about 0.90 times",
        ),
        (None, "The gradient is mostly noise at a batch of 32: a larger batch takes fewer steps."),
    ],
)
def test_advice(noise: float | None, sentence: str) -> None:
    found = advice({"extrap/gradient_noise_scale": noise, "extrap/batch_size": 32.0})
    assert found is not None and found.startswith(sentence)
    assert advice(row(1)) is None


def test_folders_without_runs_are_refused(tmp_path: Path, error_of: Any) -> None:
    assert error_of("watch", tmp_path / "no").startswith(f"{tmp_path / 'no'} does not exist")
    assert "no run is there" in error_of("watch", tmp_path)


@pytest.fixture(scope="module")
def page(runs: Path) -> Iterator[tuple[str, Any]]:
    # It is imported by the page, in the folder of the page.
    if find_spec("trackio") is None:
        pytest.skip("Trackio is not installed")
    from hf_extrap.lab.watch.page import serving

    with serving([runs]) as served:
        yield served
    assert not Path(os.environ["TRACKIO_DIR"]).exists()


def test_the_token_and_the_name_of_the_host_are_needed(page: tuple[str, Any]) -> None:
    address, _ = page
    plain, _, query = address.partition("?")
    assert address.startswith("http://127.0.0.1:")
    for request in (
        Request(plain),
        Request(plain + "api/get_projects"),
        Request(f"{plain}?token=wrong"),
        Request(plain, headers={"Cookie": "hf_extrap_token=wrong"}),
        Request(address, headers={"Host": "elsewhere.example"}),
        Request(f"{plain}..%2f..%2f..%2fetc/passwd"),
    ):
        with pytest.raises(HTTPError) as refused:
            urlopen(request, timeout=20)
        assert refused.value.code == 403
    with urlopen(address, timeout=20) as answer:
        cookie = answer.headers["set-cookie"].split(";")
        assert "<html" in answer.read().decode()
    assert {part.strip() for part in cookie[1:]} == {"HttpOnly", "SameSite=Strict", "Path=/"}
    with urlopen(Request(plain, headers={"Cookie": cookie[0]}), timeout=20) as answer:
        assert answer.status == 200
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(f"{plain}file?path=/etc/passwd&{query}"), timeout=20)
    assert refused.value.code in (403, 404)


def test_rows_are_shown_with_the_names_of_report_to(page: tuple[str, Any], runs: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    _, store = page
    assert sorted(SQLiteStorage.get_runs("hf_extrap")) == ["deep/past", "plain"]
    logs = SQLiteStorage.get_logs("hf_extrap", "plain")
    shown = [{key: value for key, value in log.items() if key not in ("timestamp", "step")} for log in logs]
    assert shown[0] == {"train/loss": 4.9, "train/extrap/loss_at_y": 4.9}
    assert shown[1]["train/steps_per_second"] == 2.0 and shown[1]["train/extrap/batch_size"] == 32.0
    assert shown[2] == {"eval/loss": 4.0, "eval/perplexity": 55.0, "eval/extrap/loss_at_x": 4.1}
    (alert,) = SQLiteStorage.get_alerts("hf_extrap")
    assert alert["run"] == "plain" and "a larger batch pays" in alert["text"]
    # A running run is followed.
    assert store.update() == 0
    RunFolder(runs / "deep" / "past").write_history([row(1), row(2)])
    assert store.update() == 1
    assert len(SQLiteStorage.get_logs("hf_extrap", "deep/past")) == 2


def test_a_browser_draws_the_curves(page: tuple[str, Any], tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium, such as Debian's, which is not here")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=15000", "--window-size=1400,1000"]
    done = subprocess.run(
        [chromium, *words, f"--user-data-dir={tmp_path}", "--dump-dom", page[0]],
        capture_output=True,
        text=True,
        timeout=120,
    )
    for text in ("plain", "deep/past", "perplexity", "loss_at_y", "gradient_noise_scale", "Batch size"):
        assert text in done.stdout, text
    assert "<canvas" in done.stdout or "<svg" in done.stdout


def test_the_program_follows_runs_until_ctrl_c(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_extrap.lab.watch import page

    class TwoUpdates:
        runs = ("plain", "deep/past")
        updates = 0

        def update(self) -> None:
            self.updates += 1
            if self.updates == 2:
                raise KeyboardInterrupt

    opened: list[str] = []
    monkeypatch.setattr(page, "serving", lambda *_: nullcontext(("http://127.0.0.1:1/?token=x", TwoUpdates())))
    monkeypatch.setattr(page, "PERIOD", 0.01)
    monkeypatch.setattr(page.webbrowser, "open", opened.append)
    assert main(["watch", str(runs)]) == 0 and main(["watch", str(runs), "--no_browser"]) == 0
    assert opened == ["http://127.0.0.1:1/?token=x"]
    printed = capsys.readouterr().out
    assert printed == "2 runs at http://127.0.0.1:1/?token=x\nCtrl-C ends it.\nended\n" * 2


def test_the_history_of_a_run_has_its_speed(tiny_language_model: Path, tmp_path: Path) -> None:
    words = ["train", str(tiny_language_model), "--output_dir", str(tmp_path / "run"), "--save_steps", "3"]
    began = time.perf_counter()
    assert main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    rates = [row["steps_per_second"] for row in rows if "loss" in row]
    assert len(rates) == 6 and min(rates) > 0 and sum(1 / rate for rate in rates) < time.perf_counter() - began
