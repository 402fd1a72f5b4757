"""Post-local SGD in the Trainer: the switch, each worker's steps, evaluations, checkpoints, refusals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import TrainerCallback

from hf_extrap import ExtrapTrainer
from hf_extrap.training.model_card import optimizer_name
from tests.support.tiny_images import train_images
from tests.support.tiny_trainer import Sentences, arguments, gpt2, make, train, weights

COMMON: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.5, "max_steps": 8}
COMMON |= {"lr_scheduler_type": "constant"}
NESTEROV = {"optim": "sgd", "sgd_momentum": 0.9, "sgd_nesterov": True}
ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1, "adam_epsilon": 1e-3}
LOCAL = {"extrap_virtual_workers": 2, "local_steps": 3, "local_sgd_start": 0.25}


MATRIX = [pytest.param(preset, marks=pytest.mark.matrix) for preset in ("extrap", "optimistic")]


class Watch(TrainerCallback):
    """The parameters after every step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(torch.cat([p.detach().reshape(-1) for p in kwargs["model"].parameters()]))


def textbook(folder: Path, fields: dict[str, Any], start: int, period: int, steps: int, workers: int) -> torch.Tensor:
    """A model and an optimizer for each worker, in a loop; the mean of their parameters at the end."""
    models = [gpt2() for _ in range(workers)]
    optimizers = []
    for model in models:
        trainer = ExtrapTrainer(model, arguments(folder, **fields))
        optimizers.append(trainer.create_optimizer().base)
        model.train()
    rows = Sentences(64).rows
    for step in range(steps):
        batches = [rows[4 * (workers * step + k) % 64 :][:4] for k in range(workers)]
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            mine = batches if step < start else [batches[k]]
            torch.stack([model(input_ids=b, labels=b).loss for b in mine]).mean().backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        if step >= start and ((step - start + 1) % period == 0 or step == steps - 1):
            with torch.no_grad():
                for same in zip(*(model.parameters() for model in models), strict=True):
                    mean = torch.stack(same).mean(0)
                    for p in same:
                        p.copy_(mean)
    return torch.cat([p.detach().reshape(-1) for p in models[0].parameters()])


@pytest.mark.parametrize("base, steps", [(NESTEROV, 7), (ADAMW, 8)], ids=["nesterov", "adamw"])
def test_each_worker_is_a_model_with_an_optimizer(tmp_path: Path, base: dict[str, Any], steps: int) -> None:
    fields = {**base, **COMMON, "max_steps": steps}
    trainer = train(tmp_path, **fields, **LOCAL)
    # 6 local steps have two averagings; of 5, the last two are averaged at the end.
    expected = textbook(tmp_path, fields, 2, 3, steps, 2)
    torch.testing.assert_close(weights(trainer), expected, rtol=1e-4, atol=2e-6)
    ends = weights(trainer).clone()
    trainer.evaluate()
    assert torch.equal(weights(trainer), ends)
    together = train(tmp_path, **fields, extrap_virtual_workers=2)
    assert (weights(together) - expected).abs().max() > 1e-4
    assert optimizer_name(trainer.optimizer) == ("SGD" if base is NESTEROV else "AdamW")


@pytest.mark.parametrize("preset", ["none", "extrap-past", *MATRIX])
def test_until_the_switch_nothing_differs_and_then_nothing_extrapolates(tmp_path: Path, preset: str) -> None:
    fields = {**NESTEROV, **COMMON, "extrap": preset, "extrap_virtual_workers": 2}
    runs = {}
    for name, more in {"stock": {}, "local": {"local_steps": 2, "local_sgd_start": 0.5}}.items():
        trainer = train(tmp_path, **fields, **more, callbacks=[watch := Watch()])
        runs[name] = (watch.seen, trainer)
    (stock, _), (local, trainer) = runs["stock"], runs["local"]
    for step in range(4):
        assert torch.equal(stock[step], local[step]), step
    # Between averagings the parameters do not change.
    assert torch.equal(local[4], local[3]) and torch.equal(local[6], local[5])
    assert not torch.equal(local[5], local[4]) and not torch.equal(local[5], stock[5])
    assert trainer.extrapolated.skipped_steps == 0 and trainer.extrapolated.step_count == 8
    moves = [row["extrap/displacement_norm"] for row in trainer.state.log_history if "loss" in row]
    assert moves[4:] == [0.0] * 4
    assert trainer.extrapolated.config.end_step == (None if preset == "none" else 4)
    ended = train(tmp_path, **fields, **{"local_steps": 2}, **({} if preset == "none" else {"extrap_end_step": 4}))
    torch.testing.assert_close(weights(ended), local[7], rtol=1e-5, atol=1e-7)


def test_evaluations_see_the_mean_and_saves_change_nothing(tmp_path: Path) -> None:
    fields = {**NESTEROV, **COMMON, **LOCAL}
    plain = train(tmp_path, **fields)
    busy = train(tmp_path, **fields, eval_strategy="steps", eval_steps=1)
    assert torch.equal(weights(busy), weights(plain))
    short = make(tmp_path, **{**NESTEROV, **COMMON, **LOCAL, "max_steps": 4, "local_sgd_start": 0.5})
    short.train()
    # The mean after two local steps, in the middle of a round of the long run.
    losses = {row["step"]: row["eval_loss"] for row in busy.state.log_history if "eval_loss" in row}
    assert short.evaluate()["eval_loss"] == pytest.approx(losses[4], rel=1e-6)
    assert losses[4] != losses[3] != losses[2]
    fields = {**ADAMW, **COMMON, "extrap_virtual_workers": 2, "local_steps": 2, "local_sgd_start": 0.25}
    plain = train(tmp_path, **fields)
    assert torch.equal(weights(plain), weights(train(tmp_path, **fields, save_strategy="steps", save_steps=4)))


@pytest.mark.parametrize(
    "base, at", [(NESTEROV, 2), (ADAMW, 4), (ADAMW, 5), pytest.param(NESTEROV, 4, marks=pytest.mark.matrix)]
)
def test_a_resume_is_exact_since_a_checkpoint_averages(tmp_path: Path, base: dict[str, Any], at: int) -> None:
    """At the switch, between averagings, and at one."""
    fields = {**base, **COMMON, **LOCAL, "save_strategy": "steps", "save_steps": at, "extrap": "extrap-past"}
    whole = train(tmp_path / "whole", **fields, model=gpt2(dropout=0.1))
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{at}")
    again = train(tmp_path / "again", **fields, model=gpt2(dropout=0.1), resume=checkpoint)
    assert torch.equal(weights(whole), weights(again))
    assert again.extrapolated.config.end_step == 2
    # A file of the workers' states from the first local step on.
    assert (tmp_path / "whole" / f"checkpoint-{at}" / "local_sgd_rank_0.pt").is_file() == (at > 2)


def test_a_mean_gradient_and_the_switch_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_extrap")
    trainer = train(tmp_path, **NESTEROV, **COMMON, **LOCAL)
    assert "from step 2 on each of 2 workers steps by itself, and every 3 steps they are averaged" in caplog.text
    norms = [row["grad_norm"] for row in trainer.state.log_history if "loss" in row]
    assert max(norms) / min(norms) < 3
    caplog.clear()
    train(tmp_path, **NESTEROV, **COMMON, local_steps=2)
    assert [r.levelname for r in caplog.records if "each of 1 workers" in r.getMessage()] == ["WARNING"]


def test_settings_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    late = {"extrap": "extrap", "extrap_start_step": 4, "extrap_virtual_workers": 2}
    for fields, message in (
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2 and extrap_virtual_"),
        ({"local_sgd_start": 0.0, "extrap": "extrap"}, "local_sgd_start is 0 and extrap is 'extrap'"),
        ({"extrap_virtual_workers": 2, "batch_workers": True}, "batch_workers is true"),
        (late, "extrap_start_step is 4 and local SGD starts at step 3"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, local_steps=2, **fields)


def test_a_last_step_of_fewer_batches_moves_the_first_workers_only(tmp_path: Path) -> None:
    """16 micro-batches for 3 workers: the sixth step has one, and its worker's step counts a third in the mean."""
    fields = {**COMMON, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 6, "extrap_virtual_workers": 3}
    trainer = train(tmp_path, **fields, local_steps=5, local_sgd_start=0.0, callbacks=[watch := Watch()])
    before, model = watch.seen[4], gpt2()
    torch.nn.utils.vector_to_parameters(before, model.parameters())
    batch = Sentences(64).rows[60:]
    model(input_ids=batch, labels=batch).loss.backward()
    step = 0.05 * torch.cat([p.grad.reshape(-1) for p in model.parameters()]) / 3
    torch.testing.assert_close(weights(trainer), before - step, rtol=1e-5, atol=1e-7)


def test_batch_norm_is_evaluated_at_the_mean(tmp_path: Path) -> None:
    fields = {"max_steps": 4, "extrap_virtual_workers": 2, "eval_strategy": "steps", "eval_steps": 3}
    losses = {}
    for name, more in {"together": {}, "local": {"local_steps": 2, "local_sgd_start": 0.5}}.items():
        trainer = train_images(tmp_path, **fields, **more, recalibrate_batch_norm=2)
        losses[name] = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    # One local step is as good as one together, to the spread of a learning rate's square.
    assert losses["local"][0] == pytest.approx(losses["together"][0], rel=0.05)
    assert losses["local"] != losses["together"]
