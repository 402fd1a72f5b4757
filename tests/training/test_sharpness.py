"""The sharpness logged along training, and a training that it does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_extrap import ExtrapTrainer
from hf_extrap.recipes.configuration import resolve
from hf_extrap.recipes.run import run
from hf_extrap.recipes.run_folder import RunFolder
from hf_extrap.training.curvature.lanczos import largest_eigenpair
from tests.support.tiny_trainer import gpt2, make, train, weights
from tests.training.logged import history

EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
SHARPNESS, PRECONDITIONED = "extrap/sharpness", "extrap/preconditioned_sharpness"


def rows(trainer: Trainer, key: str) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"extrap": "none", "optim": "adamw_torch"}, marks=pytest.mark.matrix),
        {"extrap": "extrap", "extrap_virtual_workers": 2, "extrap_batch": "independent"},
        pytest.param(
            {"extrap": "extrap-past", "extrap_step_size": "auto", "extrap_virtual_workers": 2}, marks=pytest.mark.matrix
        ),
        {"extrap": "gaussian", "optim": "adamw_torch"},
    ],
)
def test_training_is_bit_identical_with_and_without(tmp_path: Path, fields: dict[str, Any]) -> None:
    without = train(tmp_path / "without", model=gpt2(dropout=0.2), **EVALUATED, **fields)
    state = torch.get_rng_state()
    measured = train(tmp_path / "with", model=gpt2(dropout=0.2), sharpness_batches=3, **EVALUATED, **fields)
    assert torch.equal(weights(without), weights(measured))
    assert torch.equal(state, torch.get_rng_state())
    assert history(without) == [row for row in history(measured) if SHARPNESS not in row]
    found = rows(measured, SHARPNESS)
    assert [row["step"] for row in found] == [2, 4]
    assert all(row[SHARPNESS] > 0 for row in found)
    assert all((PRECONDITIONED in row) == ("optim" in fields) for row in found)


class Watched(ExtrapTrainer):
    """Keeps the micro-batches of every step."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.batches = batches
        return batches, count


class Dense(TrainerCallback):
    """The same measurement at every evaluation, by all columns of the Hessian."""

    def __init__(self) -> None:
        self.values: list[tuple[float, float]] = []
        self.trainer: Any = None

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        sharpness = self.trainer.sharpness
        assert len(sharpness.recent) == min(2, self.trainer.state.global_step)
        assert torch.equal(sharpness.recent[-1][0]["input_ids"], self.trainer.batches[-1]["input_ids"])
        mean_loss = sharpness.mean_loss(sharpness.recent)
        columns = torch.stack([mean_loss.hessian_product(e) for e in torch.eye(mean_loss.point.numel())])
        root = sharpness.preconditioner(mean_loss).sqrt()
        both = (columns, root[:, None] * columns * root)
        self.values.append(tuple(float(torch.linalg.eigvalsh(m)[-1]) for m in both))


def test_logged_values_are_those_of_the_dense_hessian(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gpt2()
    # So few parameters that every column can be had.
    model.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    model.transformer.h[0].attn.c_attn.bias.requires_grad_(True)
    dense = Dense()
    fields = {**EVALUATED, "eval_steps": 1, "extrap": "extrap-past", "optim": "adamw_torch", "learning_rate": 0.02}
    trainer = make(tmp_path, kind=Watched, model=model, sharpness_batches=2, callbacks=[dense], **fields)
    dense.trainer = trainer
    trainer.train()
    found = [(row[SHARPNESS], row[PRECONDITIONED]) for row in rows(trainer, SHARPNESS)]
    assert len(found) == len(dense.values) == 4
    for own, expected in zip(found, dense.values, strict=True):
        assert own == pytest.approx(expected, rel=0.05)


def test_a_diverged_run_continues_and_logs_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = train(tmp_path, learning_rate=1e30, max_steps=2, eval_strategy="steps", eval_steps=2, sharpness_batches=1)
    (row,) = rows(trainer, SHARPNESS)
    assert row[SHARPNESS] != row[SHARPNESS]
    assert "no sharpness at step 2" in caplog.text


def test_recurrent_runs_are_measured_and_train_identically(tmp_path: Path, tiny_language_model: Path) -> None:
    def words(folder: str) -> list[str]:
        return ["--output_dir", str(tmp_path / folder), "--extrap", "extrap-past", "--extrap_virtual_workers", "2"]

    run(resolve(tiny_language_model, words("without")))
    run(resolve(tiny_language_model, [*words("with"), "--sharpness_batches", "3"]))
    without, measured = (RunFolder(tmp_path / name).read_history() for name in ("without", "with"))
    for key in ("loss", "eval_perplexity"):
        assert [row[key] for row in without if key in row] == [row[key] for row in measured if key in row]
    assert [row["step"] for row in measured if SHARPNESS in row] == [3, 6]
    assert all(row[SHARPNESS] > 0 for row in measured if SHARPNESS in row)


def test_under_autocast_the_measurement_is_in_float32(tmp_path: Path) -> None:
    trainer = train(tmp_path, bf16=True, sharpness_batches=1, **EVALUATED)
    assert "_original_forward" in vars(trainer.model)
    casting = trainer.model.forward
    recent = trainer.sharpness.recent
    ((inputs, _),) = recent
    rounded = trainer.model(**inputs).loss.item()
    plain = gpt2().eval()
    plain.load_state_dict(trainer.model.state_dict())
    mean_loss = trainer.sharpness.mean_loss(recent)
    measured = mean_loss.value()
    assert measured == pytest.approx(plain(**inputs).loss.item(), abs=1e-6)
    assert abs(measured - rounded) > 1e-5
    assert trainer.model.forward == casting
    pair = largest_eigenpair(mean_loss.hessian_product, mean_loss.point)
    assert rows(trainer, SHARPNESS)[-1][SHARPNESS] == pytest.approx(pair.value, rel=0.05)
