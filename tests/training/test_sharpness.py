"""The sharpness logged along training, and a training that does not feel it."""

from __future__ import annotations

from collections.abc import Callable
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

EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
SHARPNESS, PRECONDITIONED = "extrap/sharpness", "extrap/preconditioned_sharpness"


def rows(trainer: Trainer, key: str) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize(
    "fields",
    [
        {"extrap": "none", "optim": "adamw_torch"},
        {"extrap": "extrap", "extrap_virtual_workers": 2, "extrap_batch": "independent"},
        {"extrap": "extrap-past", "extrap_step_size": "auto", "extrap_virtual_workers": 2},
        {"extrap": "gaussian", "optim": "adamw_torch"},
    ],
)
def test_training_is_bit_identical_with_and_without(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = lambda: gpt2(dropout=0.2)  # noqa: E731
    without = train(tmp_path / "without", model=model(), **EVALUATED, **fields)
    state = torch.get_rng_state()
    measured = train(tmp_path / "with", model=model(), sharpness_batches=3, **EVALUATED, **fields)
    assert torch.equal(weights(without), weights(measured))
    assert torch.equal(state, torch.get_rng_state())
    timing = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    for one, other in zip(rows(without, "eval_loss"), rows(measured, "eval_loss"), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}
    assert rows(without, "loss") == rows(measured, "loss")
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
        self.values.append(
            tuple(float(torch.linalg.eigvalsh(m)[-1]) for m in (columns, root[:, None] * columns * root))
        )


def test_logged_values_are_those_of_the_dense_hessian(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gpt2()
    # So few parameters that every column can be had.
    model.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    model.transformer.h[0].attn.c_attn.bias.requires_grad_(True)
    dense = Dense()
    trainer = make(
        tmp_path,
        kind=Watched,
        model=model,
        extrap="extrap-past",
        optim="adamw_torch",
        learning_rate=0.02,
        sharpness_batches=2,
        callbacks=[dense],
        **{**EVALUATED, "eval_steps": 1},
    )
    dense.trainer = trainer
    trainer.train()
    found = [(row[SHARPNESS], row[PRECONDITIONED]) for row in rows(trainer, SHARPNESS)]
    assert len(found) == len(dense.values) == 4
    for own, expected in zip(found, dense.values, strict=True):
        assert own == pytest.approx(expected, rel=0.05)


def test_a_diverged_run_goes_on_and_logs_no_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = train(tmp_path, learning_rate=1e30, max_steps=2, eval_strategy="steps", eval_steps=2, sharpness_batches=1)
    (row,) = rows(trainer, SHARPNESS)
    assert row[SHARPNESS] != row[SHARPNESS]
    assert "no sharpness at step 2" in caplog.text


def test_bad_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sharpness_batches is -1; allowed"):
        make(tmp_path, sharpness_batches=-1)


def test_recurrent_runs_are_measured_and_train_on_as_before(tmp_path: Path, tiny_language_model: Path) -> None:
    def words(folder: str) -> list[str]:
        return ["--output_dir", str(tmp_path / folder), "--extrap", "extrap-past", "--extrap_virtual_workers", "2"]

    run(resolve(tiny_language_model, words("without")))
    run(resolve(tiny_language_model, [*words("with"), "--sharpness_batches", "3"]))
    without, measured = (RunFolder(tmp_path / name).read_history() for name in ("without", "with"))
    losses: Callable[[list[dict[str, Any]]], list[float]] = lambda found: [  # noqa: E731
        row[key] for row in found for key in ("loss", "eval_perplexity") if key in row
    ]
    assert losses(without) == losses(measured)
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
