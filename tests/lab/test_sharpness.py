"""hf-extrap sharpness: a saved model is loaded, measured, drawn and written once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import MarianMTModel

from hf_extrap.cli import main
from hf_extrap.lab.sharpness import POINTS
from hf_extrap.recipes.configuration import resolve, to_words
from hf_extrap.recipes.models import ExtrapLstmForCausalLM
from hf_extrap.recipes.run import run
from hf_extrap.recipes.run_folder import RunFolder
from hf_extrap.recipes.saved_run import load_saved_run
from hf_extrap.training.curvature.mean_loss import flatten

ErrorOf = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_language_model: Path) -> Path:
    """A run with checkpoints after 3 and 6 steps of AdamW."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["--output_dir", str(folder), "--optim", "adamw_torch", "--learning_rate", "0.01"]
    run(resolve(tiny_language_model, [*words, "--extrap", "extrap-past", "--extrap_virtual_workers", "2"]))
    return folder


def measured(words: list[str], folder: Path) -> dict[str, Any]:
    assert main(["sharpness", *words]) == 0
    return json.loads((folder / "sharpness.json").read_text())


def test_a_checkpoint_with_its_optimizer(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained / "checkpoint-3"
    content = measured([str(folder), "--batches", "3", "--tolerance", "1e-3"], folder)
    shown = capsys.readouterr().out
    assert content["step"] == 3 and content["batches"] == 3 and content["split"] == "train"
    assert "sharpness in Adam's metric" in shown and f"{content['sharpness']:.4g}" in shown
    assert content["sharpness_residual"] < 2e-3 and content["preconditioned_residual"] < 2e-3
    assert content["difference_error"] < 0.01
    assert content["learning_rate"] == pytest.approx(0.005)
    assert content["preconditioned_sharpness"] > 0
    assert (folder / "sharpness.png").read_bytes()[:4] == b"\x89PNG"

    # The lines agree with slope and curvature at 0, by second differences.
    line = content["lines"]["gradient"]
    assert len(line["loss"]) == POINTS
    zero = line["learning_rate"].index(min(line["learning_rate"], key=abs))
    assert line["learning_rate"][zero] == 0 and line["loss"][zero] == pytest.approx(content["loss"], abs=1e-6)
    assert line["length"][-1] == pytest.approx(line["learning_rate"][-1] * content["gradient_norm"])
    assert line["share_of_learning_rate"][-1] == pytest.approx(line["learning_rate"][-1] / 0.005)
    step = line["length"][1] - line["length"][0]
    slope = (line["loss"][zero + 1] - line["loss"][zero - 1]) / (2 * step)
    assert slope == pytest.approx(-content["gradient_norm"], rel=0.1)
    assert content["gradient_curvature"] <= content["sharpness"] * 1.001

    saved = load_saved_run(folder)
    samples = saved.trainer.sharpness.samples(saved.trainer.get_train_dataloader(), 3, streams=2)
    # Workers take turns: the third batch continues where the first one ended.
    assert samples[0][1] is None and samples[1][1] is None and samples[2][1] is not None
    model = ExtrapLstmForCausalLM.from_pretrained(folder).eval()
    carried = model(samples[0][0]["input_ids"][:, :-1]).cache_params
    torch.testing.assert_close(samples[2][1], carried)
    loss = torch.zeros(())
    for ids, state in ((inputs["input_ids"], state) for inputs, state in samples):
        logits = model(ids[:, :-1], cache_params=state).logits
        loss = loss + F.cross_entropy(logits.transpose(1, 2), ids[:, 1:]) / 3
    assert loss.item() == pytest.approx(content["loss"], abs=1e-5)
    gradient = flatten(torch.autograd.grad(loss, list(model.parameters())))
    assert float(gradient.norm()) == pytest.approx(content["gradient_norm"], rel=1e-4)


def test_a_finished_run_has_no_optimizer(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], error_of: ErrorOf
) -> None:
    content = measured([str(trained), "--split", "validation", "--batches", "1"], trained)
    assert content["step"] is None and content["learning_rate"] is None and content["preconditioned_sharpness"] is None
    assert content["lines"]["gradient"]["share_of_learning_rate"] is None
    assert "Adam" not in capsys.readouterr().out
    assert "exists already; give another --output_dir" in error_of("sharpness", trained)
    elsewhere = tmp_path / "elsewhere"
    words = [str(trained), "--split", "validation", "--batches", "1", "--output_dir", str(elsewhere)]
    by_differences = measured([*words, "--differentiation", "differences"], elsewhere)
    assert by_differences["sharpness"] == pytest.approx(content["sharpness"], rel=0.02)
    assert by_differences["differentiation"] == "differences"


def test_a_saved_model_takes_its_fields_from_a_file(
    trained: Path, tmp_path: Path, tiny_language_model: Path, error_of: ErrorOf
) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained, model, ignore=shutil.ignore_patterns("run.json", "checkpoint-*", "sharpness.*"))
    assert "give --config FILE.yaml or --task NAME" in error_of("sharpness", model)
    words = ["--config", str(tiny_language_model), "--extrap_virtual_workers", "2", "--batches", "1"]
    content = measured([str(model), *words, "--disable_tqdm", "true"], model)
    other = tmp_path / "other"
    same = measured([str(trained), "--batches", "1", "--output_dir", str(other)], other)
    assert content["sharpness"] == pytest.approx(same["sharpness"], rel=1e-4)
    assert not (model / "run.json").exists()


def test_translation_leaves_out_the_fixed_positions(tmp_path: Path, tiny_translation: Path) -> None:
    run(resolve(tiny_translation, ["--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--eval_strategy", "no"]))
    folder = tmp_path / "run" / "checkpoint-3"
    content = measured([str(folder), "--batches", "1"], folder)
    assert content["task"] == "translation" and content["sharpness"] > 0 and content["sharpness_residual"] < 0.02
    assert content["preconditioned_sharpness"] > 0
    model = MarianMTModel.from_pretrained(folder)
    fixed = sum(p.numel() for name, p in model.named_parameters() if "embed_positions" in name)
    assert content["parameters"] == sum(p.numel() for p in model.parameters()) - fixed


def test_image_classification(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fields = {"task": "image_classification", "depth": 8, "width": 2, "random_crop": 1, "max_train_samples": 64}
    fields |= {"max_eval_samples": 32, "per_device_train_batch_size": 16, "max_steps": 4, "learning_rate": 0.1}
    fields |= {"eval_strategy": "steps", "eval_steps": 2, "sharpness_batches": 2, "disable_tqdm": True}
    run(resolve(None, [*to_words(fields), "--output_dir", str(folder)]))
    logged = [row["extrap/sharpness"] for row in RunFolder(folder).read_history() if "extrap/sharpness" in row]
    assert len(logged) == 2 and min(logged) > 0
    words = [str(folder), "--batches", "2"]
    content = measured(words, folder)
    running = measured([*words, "--batch_norm", "running", "--output_dir", str(tmp_path)], tmp_path)
    assert content["batch_norm"] == "batch" and content["sharpness"] > 0 and content["batch_size"] == 16
    # Untrained running statistics give a different loss.
    assert running["loss"] != pytest.approx(content["loss"], rel=0.01)


def test_errors_say_what_is_allowed(trained: Path, tmp_path: Path, error_of: ErrorOf) -> None:
    elsewhere = ["--output_dir", str(tmp_path / "out")]
    assert "needs the folder" in error_of("sharpness")
    assert "does not exist" in error_of("sharpness", tmp_path / "nowhere")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained, unfinished, ignore=shutil.ignore_patterns("model.safetensors", "sharpness.*"))
    shutil.rmtree(unfinished / "checkpoint-6")
    last = f"holds no model.safetensors; give its last checkpoint, {unfinished / 'checkpoint-3'}"
    assert last in error_of("sharpness", unfinished)
    for words, sentence in (
        (["--split", "test"], "split is 'test'; allowed: train, validation"),
        (["--batches", "0"], "batches is 0"),
        (["--tolerance", "2"], "tolerance is 2"),
        (["--differentiation", "no"], "allowed: autograd, differences"),
        (["--config", "x.yaml"], "leave out --config"),
        (["--hidden_size", "8"], "of another model"),
        (["--hiden_size", "8"], "unknown field --hiden_size"),
    ):
        assert sentence in error_of("sharpness", trained, *elsewhere, *words)
    assert not (tmp_path / "out").exists()
