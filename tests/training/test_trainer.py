"""The Trainer: the stock one bit for bit without extrapolation, the plain loop with it, x between steps, logs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_extrap import PRESETS, ExtrapConfig, Extrapolated, ExtrapTrainer
from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM
from hf_extrap.training.requirements import check_requirements
from tests.support.tiny_trainer import Sentences, arguments, gpt2, marian, train, weights

MATRIX = [
    pytest.param(name, marks=pytest.mark.matrix)
    for name in ("optimistic", "past-update", *PRESETS)
    if name not in ("none", "extrap", "extrap-past", "extragradient", "sam")
]
MOMENTUM = {"sgd_momentum": 0.9, "sgd_nesterov": True}


def lstm() -> ExtrapLstmForCausalLM:
    torch.manual_seed(0)
    return ExtrapLstmForCausalLM(ExtrapLstmConfig(vocab_size=50, embedding_size=8, hidden_size=8, dropout=0.0))


def vector(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    "fields", [{}, {"gradient_accumulation_steps": 3, "optim": "adamw_torch", "weight_decay": 0.1}]
)
def test_none_is_the_stock_trainer_bit_for_bit(tmp_path: Path, fields: dict[str, Any]) -> None:
    stock = train(tmp_path / "stock", kind=Trainer, model=gpt2(dropout=0.1), **fields)
    ours = train(tmp_path / "ours", model=gpt2(dropout=0.1), **fields)
    assert torch.equal(weights(ours), weights(stock))
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (stock, ours)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.matrix), 2])
@pytest.mark.parametrize("preset", ["extrap", "extrap-past", "extragradient", "sam", *MATRIX[:2]])
def test_it_is_the_plain_loop(tmp_path: Path, preset: str, workers: int) -> None:
    fields = {"extrap_step_ratio": 0.5} if preset != "sam" else {}
    options = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.5, "lr_scheduler_type": "constant"}
    trainer = train(tmp_path, extrap=preset, extrap_virtual_workers=workers, **options, **fields, **MOMENTUM)

    model = gpt2()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    overrides = {name.removeprefix("extrap_"): value for name, value in fields.items()}
    optimizer = Extrapolated(base, ExtrapConfig.preset(preset, **overrides), virtual_workers=workers)
    rows = Sentences(64).rows
    for step in range(6):
        batches = [rows[(step * workers + k) * 4 :][:4] for k in range(workers)]

        def backward(batch: torch.Tensor) -> None:
            (model(input_ids=batch, labels=batch).loss / workers).backward()

        if optimizer.config.scope == "global" and optimizer.wants_probe:
            with optimizer.probing():
                for batch in batches:
                    backward(batch)
        for k, batch in enumerate(batches):
            if optimizer.wants_probe:
                with optimizer.probing(worker=k):
                    backward(batch)
            optimizer.train(worker=k)
            backward(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    expected = vector(model)
    torch.testing.assert_close(weights(trainer), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, weights(train(tmp_path / "none", **options, **MOMENTUM)), atol=1e-5)


class Watch(TrainerCallback):
    """Records the parameters at every event between the passes."""

    def __init__(self) -> None:
        self.seen: dict[str, list[torch.Tensor]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.record("begin", model)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.record("between", model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.record("before", model)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.record("evaluated", model)

    def record(self, event: str, model: torch.nn.Module) -> None:
        self.seen.setdefault(event, []).append(vector(model))


@pytest.mark.parametrize("preset", ["extrap", "extrap-past", "extragradient", *MATRIX])
def test_the_parameters_are_x_at_every_event_and_in_every_save(tmp_path: Path, preset: str) -> None:
    watch = Watch()
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    fields = {"extrap": preset, "extrap_virtual_workers": 2, "load_best_model_at_end": True, **steps}
    trainer = train(tmp_path, callbacks=[watch, EarlyStoppingCallback(5)], **fields, **MOMENTUM)
    for begin, between, before in zip(watch.seen["begin"], watch.seen["between"], watch.seen["before"], strict=True):
        assert torch.equal(begin, between) and torch.equal(begin, before)
    # What step 2 leaves is what is evaluated and saved, and what step 3 begins with.
    x = watch.seen["begin"][2]
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    loaded = gpt2()
    loaded.load_state_dict(saved, strict=False)
    assert torch.equal(vector(loaded), x)
    assert torch.equal(watch.seen["evaluated"][0], x)
    losses = {row["eval_loss"]: row["step"] for row in trainer.state.log_history if "eval_loss" in row}
    best = losses[min(losses)]
    final = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in final.items())


@pytest.mark.parametrize(
    "kind, extrap, model, factor",
    [
        (ExtrapTrainer, "extrap-past", gpt2, 1),
        (ExtrapTrainer, "none", marian, 1),
        (ExtrapTrainer, "extrap-past", marian, 1),
        (Trainer, None, lstm, 1),
        # The fault of the stock Trainer, which shows that the test can fail.
        (Trainer, None, marian, 4),
    ],
)
def test_accumulation_does_not_scale_the_gradient(
    tmp_path: Path, kind: type[Trainer], extrap: str | None, model: Any, factor: float
) -> None:
    norms = []
    for steps in (1, 4):
        fields = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 8 // steps, "max_steps": 1}
        fields |= {"train_sampling_strategy": "sequential"} | ({"extrap": extrap} if extrap else {})
        norms.append(train(tmp_path, kind=kind, model=model(), **fields).state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(factor * norms[0], rel=1e-4)


def test_every_logged_row_describes_the_extrapolation(tmp_path: Path) -> None:
    fields = {"extrap": "extrap-past", "extrap_virtual_workers": 4, "extrap_step_ratio": 0.5}
    steps = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "lr_scheduler_type": "constant"}
    trainer = train(tmp_path, **steps, **fields)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["extrap/step_size"] == pytest.approx(0.5 * row["learning_rate"], rel=1e-4)
        assert row["extrap/displacement_norm"] > 0
        assert 0 < row["extrap/direction_cosine"] < 1
        assert row["extrap/loss_at_y"] == row["loss"]
        assert row["extrap/gradient_noise_scale"] > 0
    evaluated = [row for row in trainer.state.log_history if "eval_loss" in row]
    # Along a descent direction the loss is lower at y.
    assert all(row["eval_extrap/loss_at_y"] < row["eval_extrap/loss_at_x"] for row in evaluated)
    one = train(tmp_path / "one", extrap="none", max_steps=2)
    assert "extrap/gradient_noise_scale" not in one.state.log_history[0]
    two = train(tmp_path / "two", extrap="none", extrap_virtual_workers=2, max_steps=2)
    assert math.isfinite(two.state.log_history[0]["extrap/gradient_noise_scale"])
    assert two.state.log_history[0]["extrap/displacement_norm"] == 0


def test_a_negligible_displacement_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"extrap": "extrap-past", "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}
    trainer = train(tmp_path / "near", extrap_step_ratio=0.125, **fields)
    assert 0 < trainer.state.log_history[1]["extrap/displacement_share"] < 0.01
    assert caplog.text.count("changes next to nothing") == 1
    caplog.clear()
    far = train(tmp_path / "far", **fields)
    row = far.state.log_history[1]
    # A tenth of the last step in each layer; steps differ in length.
    assert 0.02 < row["extrap/displacement_share"] < 0.5
    assert "next to nothing" not in caplog.text


def test_its_own_card_names_the_scheme_and_the_real_optimizer(tmp_path: Path) -> None:
    trainer = train(tmp_path, extrap="extrap-past", extrap_step_ratio=0.25, max_steps=1)
    trainer.create_model_card(model_name="toy")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"hf_extrap", "extrap:extrap-past", "arxiv:2006.05720"} <= set(card.data.tags)
    assert "and SGD stepped the parameters x" in card.text
    assert "direction: past_gradient" in card.text and "step_ratio: 0.25" in card.text


def test_evaluation_between_steps_changes_nothing(tmp_path: Path) -> None:
    for preset in ("extrap", "extrap-past", "extragradient"):
        fields = {"extrap": preset, "extrap_virtual_workers": 2}
        quiet, busy = train(tmp_path, **fields), train(tmp_path, eval_strategy="steps", eval_steps=1, **fields)
        assert torch.equal(weights(quiet), weights(busy))


class PassTrainer(ExtrapTrainer):
    """Records the sentences of every pass."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.passes = [*getattr(self, "passes", []), inputs["input_ids"]]
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_samples_of_a_fresh_direction(tmp_path: Path) -> None:
    trainer = train(tmp_path, kind=PassTrainer, extrap="extrap", extrap_batch_fraction=0.25, max_steps=3)
    assert [len(rows) for rows in trainer.passes] == [1, 4] * 3
    fields = {"extrap_batch": "independent", "train_sampling_strategy": "sequential", "max_steps": 3}
    trainer = train(tmp_path, kind=PassTrainer, extrap="extrap", **fields)
    # The first step has no other samples than its own.
    expected = [Sentences(64).rows[4 * step :][:4] for step in (0, 0, 0, 1, 1, 2)]
    assert all(torch.equal(seen, rows) for seen, rows in zip(trainer.passes, expected, strict=True))


def test_stock_arguments_and_unsupported_engines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="lacks the extrap fields"):
        ExtrapTrainer(gpt2(), arguments(tmp_path, kind=TrainingArguments))
    trainer = ExtrapTrainer(gpt2(), arguments(tmp_path, extrap="extrap-past"), train_dataset=Sentences(8))
    trainer.args.fsdp = "full_shard"
    with pytest.raises(ValueError, match="FSDP is asked for, but accelerate runs NO"):
        check_requirements(trainer)
    trainer.args.fsdp = None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed is asked for, but accelerate runs NO"):
        check_requirements(trainer)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    trainer.is_fsdp_enabled = True
    for version, refusal in ((1, "the engine is FSDP of version 1"), (2, "the engine is FSDP, where no worker has")):
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", SimpleNamespace(fsdp_version=version))
        with pytest.raises(ValueError, match=refusal):
            check_requirements(trainer)


def test_a_user_s_own_optimizer_is_wrapped_with_its_momentum(tmp_path: Path) -> None:
    model = gpt2()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    args = arguments(tmp_path, extrap="extrap-past")
    trainer = ExtrapTrainer(model, args, train_dataset=Sentences(32), optimizers=(base, None))
    for _ in range(2):
        trainer.train()
        assert trainer.extrapolated.base is base
        assert all("momentum_buffer" in state for state in base.state.values())
