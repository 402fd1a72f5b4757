"""Features of the stock Trainer: with `none` the same losses, weights and events; under extrap-past they work too."""

from __future__ import annotations

import copy
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_extrap import ExtrapConfig, Extrapolated, ExtrapTrainer, ExtrapTrainingArguments
from tests.support.tiny_trainer import Sentences, arguments, gpt2, weights

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Recorder(TrainerCallback):
    """The names of the events, in their order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []


def _record(name: str) -> Callable[..., None]:
    def event(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append((name, state.global_step))

    return event


for _name in EVENTS:
    setattr(Recorder, _name, _record(_name))


class Doubling:
    """Overrides `compute_loss`."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = 2 * outputs.loss
        return (loss, outputs) if return_outputs else loss


def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    flat = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1])
    return 2 * nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1))


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean())}


def stream(rows: int = 64) -> Iterator[dict[str, Tensor]]:
    yield from (Sentences(rows)[index] for index in range(rows))


def shards(**_: Any) -> IterableDataset:
    return IterableDataset.from_generator(stream)


def columns() -> Dataset:
    lengths = [4 + index % 7 for index in range(64)]
    rows = [Sentences(64)[index]["input_ids"][:length].tolist() for index, length in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "length": lengths})


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
SAVED = {**EVALUATED, "save_strategy": "steps", "save_steps": 2}
CASES: dict[str, dict[str, Any]] = {
    "events": {**SAVED, "gradient_accumulation_steps": 2, "save_total_limit": 1},
    "compute_loss": {"mixin": Doubling},
    "compute_loss_func": {"compute_loss_func": doubled},
    "compute_metrics": {**EVALUATED, "compute_metrics": accuracy},
    "early stopping": {
        **SAVED,
        "load_best_model_at_end": True,
        "learning_rate": 30.0,
        "max_steps": 20,
        "early_stopping": 1,
    },
    "neftune": {"neftune_noise_alpha": 5.0},
    "iterable": {"data": shards},
    "columns": {"data": columns, "collate": padded},
    "group by length": {"data": columns, "collate": padded, "train_sampling_strategy": "group_by_length"},
    "sequential": {"train_sampling_strategy": "sequential"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "save on each node": {**SAVED, "save_on_each_node": True},
    "seedable sampler": {"accelerator_config": {"use_seedable_sampler": False, "split_batches": True}},
    "own accumulation": {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
    "optim_target_modules": {"optim_target_modules": ["c_attn"]},
    "schedule-free": {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant"},
    "optimizer_cls_and_kwargs": {"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 1e-3})},
    "optimizers": {"optimizers": "bare"},
    "model_init": {"model_init": lambda: gpt2(0.1)},
    "epochs": {"max_steps": -1, "num_train_epochs": 1.5, "logging_strategy": "epoch"},
    "average tokens": {"average_tokens_across_devices": False, "include_num_input_tokens_seen": "all"},
}
SPECIAL = ("mixin", "data", "collate", "early_stopping", "optimizers", "model_init", "compute_metrics")
GIVEN = ("compute_loss_func", "optimizer_cls_and_kwargs", "compute_metrics", "model_init")


def make(folder: Path, extrap: str | None, model: Any = None, **case: Any) -> Any:
    """The stock Trainer if `extrap` is None."""
    # Trainers change the mappings that they are given.
    case = {key: copy.deepcopy(value) if isinstance(value, dict) else value for key, value in case.items()}
    fields = {key: value for key, value in case.items() if key not in (*SPECIAL, *GIVEN)}
    kind: Any = Trainer if extrap is None else ExtrapTrainer
    if "mixin" in case:
        kind = type(kind.__name__, (case["mixin"], kind), {})
    args = (
        arguments(folder, TrainingArguments, **fields)
        if extrap is None
        else arguments(folder, ExtrapTrainingArguments, extrap=extrap, **fields)
    )
    recorder = Recorder()
    callbacks = [recorder, *([EarlyStoppingCallback(case["early_stopping"])] if "early_stopping" in case else [])]
    words = {key: case[key] for key in GIVEN if key in case}
    if "model_init" not in case:
        words["model"] = gpt2(0.1) if model is None else model
    if case.get("optimizers") == "bare":
        base = torch.optim.SGD(words["model"].parameters(), lr=0.05, momentum=0.9)
        words["optimizers"] = (base, LambdaLR(base, lambda step: 0.9**step))
    elif "optimizers" in case:
        words["optimizers"] = (case["optimizers"](words["model"]), None)
    trainer = kind(
        args=args,
        train_dataset=case.get("data", lambda: Sentences(64))(),
        eval_dataset=Sentences(16),
        data_collator=case.get("collate"),
        callbacks=callbacks,
        **words,
    )
    trainer.recorder = recorder
    return trainer


def trained(folder: Path, extrap: str | None, resume: Any = None, **case: Any) -> Any:
    torch.manual_seed(5)
    trainer = make(folder, extrap, **case)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rows(trainer: Any) -> list[dict[str, float]]:
    """The history without times and without what hf_extrap adds."""
    return [
        {
            key: value
            for key, value in row.items()
            if "extrap" not in key and "runtime" not in key and "per_s" not in key
        }
        for row in trainer.state.log_history
    ]


DEFAULT = ("events", "compute_loss_func", "columns", "optimizers", "own accumulation", "early stopping")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in DEFAULT else pytest.mark.matrix) for case in CASES]
)
def test_none_is_the_stock_trainer_and_extrapolation_runs(case: str, tmp_path: Path) -> None:
    stock = trained(tmp_path / "stock", None, **CASES[case])
    none = trained(tmp_path / "none", "none", **CASES[case])
    assert none.recorder.events == stock.recorder.events
    assert torch.equal(weights(none), weights(stock))
    assert rows(none) == rows(stock)
    best, expected = none.state.best_model_checkpoint, stock.state.best_model_checkpoint
    assert (best and Path(best).name) == (expected and Path(expected).name)
    names = [
        sorted(path.name for path in folder.glob("checkpoint-*")) for folder in (tmp_path / "none", tmp_path / "stock")
    ]
    assert names[0] == names[1]
    past = trained(tmp_path / "past", "extrap-past", **CASES[case])
    assert past.state.global_step > 0 and torch.isfinite(weights(past)).all()
    if case != "early stopping":
        assert past.recorder.events == stock.recorder.events
        assert past.extrapolated.step_count == past.state.global_step
        moves = [row["extrap/displacement_norm"] for row in past.state.log_history if "loss" in row]
        assert moves[-1] > 0
    assert not torch.equal(weights(past), weights(none))


def test_predictions_are_those_of_the_stock_trainer(tmp_path: Path) -> None:
    ends = [trained(tmp_path, extrap, compute_metrics=accuracy).predict(Sentences(16)) for extrap in (None, "none")]
    assert (ends[0].predictions == ends[1].predictions).all()
    assert ends[0].metrics["test_accuracy"] == ends[1].metrics["test_accuracy"]
    past = trained(tmp_path, "extrap-past", compute_metrics=accuracy)
    assert past.predict(Sentences(16)).predictions.shape == ends[0].predictions.shape


@pytest.mark.parametrize("extrap", ["none", "extrap-past"])
def test_a_resume_that_skips_no_data(extrap: str, tmp_path: Path) -> None:
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(tmp_path / "whole", extrap, **fields)
    ends = [
        trained(
            tmp_path / f"{kind}", kind, resume=str(tmp_path / "whole" / "checkpoint-2"), ignore_data_skip=True, **fields
        )
        for kind in ((None, "none") if extrap == "none" else (extrap, extrap))
    ]
    assert torch.equal(*map(weights, ends))


class OutOfMemory:
    """Fails in the passes of the third step, forward or backward, with more than two rows in a batch."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self.state.global_step == 2 and len(inputs["input_ids"]) > 2:  # type: ignore[attr-defined]
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return loss


def test_a_smaller_batch_is_found(tmp_path: Path) -> None:
    """A retry goes on from x, with the optimizer of the first attempt, as in the stock Trainer."""
    case = {"mixin": OutOfMemory, "auto_find_batch_size": True, "optim": "sgd"}
    stock, none = trained(tmp_path, None, **case), trained(tmp_path, "none", **case)
    assert torch.equal(weights(none), weights(stock)) and none.state.train_batch_size == 2
    trainer = make(tmp_path, "extrap-past", **case)
    seen: list[Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights(trainer).clone())

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights(trainer).clone())

    trainer.add_callback(Watch())
    trainer.train()
    # Begin, two steps, begin again where they ended.
    assert torch.equal(seen[3], seen[2]) and not torch.equal(seen[2], seen[1])
    assert trainer.state.train_batch_size == 2 and trainer.extrapolated.skipped_steps == 0
    with pytest.raises(ValueError, match=r"^lr_scaling is 'linear' and auto_find_batch_size is true; allowed: "):
        make(tmp_path, "none", auto_find_batch_size=True, lr_scaling="linear", base_batch_size=4)


@pytest.mark.parametrize("extrap", ["none", "extrap-past"])
def test_an_error_within_a_pass_leaves_x(extrap: str, tmp_path: Path) -> None:
    class Failing(OutOfMemory):
        pass

    trainer = make(tmp_path, extrap, mixin=Failing)
    seen: list[Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights(trainer).clone())

    trainer.add_callback(Watch())
    with pytest.raises(RuntimeError, match="can't allocate"):
        trainer.train()
    assert torch.equal(weights(trainer), seen[-1])


def test_a_search_tunes_the_step_size_and_the_learning_rate(tmp_path: Path) -> None:
    def space(trial: optuna.Trial) -> dict[str, float]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.1, log=True),
            "extrap_step_size": trial.suggest_float("extrap_step_size", 0.05, 0.5),
        }

    case = {"model_init": lambda trial: gpt2(), **EVALUATED, "max_steps": 2, "extrap_step_size": 0.1}
    trainer = make(tmp_path, "extrap-past", **case)
    used: list[tuple[float, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            used.append((trainer.extrapolated.param_groups[0]["initial_lr"], trainer.extrapolated.config.step_size))

    trainer.add_callback(Watch())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    best = trainer.hyperparameter_search(
        hp_space=space, n_trials=3, backend="optuna", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    assert len(set(used)) == 3
    assert (best.hyperparameters["learning_rate"], best.hyperparameters["extrap_step_size"]) in used
    rate, step = used[-1]
    again = trained(tmp_path, "extrap-past", **{**case, "learning_rate": rate, "extrap_step_size": step})
    trainer.args.learning_rate, trainer.args.extrap_step_size = rate, step
    assert again.extrapolated.config == trainer.extrap_config


def test_a_search_tunes_the_preset(tmp_path: Path) -> None:
    trainer = make(tmp_path, "none", model_init=lambda trial: gpt2(), max_steps=2, **EVALUATED)
    stock = trainer.model_accepts_loss_kwargs
    grid = optuna.samplers.GridSampler({"extrap": ["none", "extrap-past"]})
    seen: dict[str, Any] = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[args.extrap] = (trainer.extrapolated.config.direction, trainer.model_accepts_loss_kwargs)

    trainer.add_callback(Watch())
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"extrap": trial.suggest_categorical("extrap", ["none", "extrap-past"])},
        n_trials=2,
        backend="optuna",
        sampler=grid,
    )
    assert seen == {"none": ("none", stock), "extrap-past": ("past_gradient", False)}


def test_an_extrapolated_among_the_optimizers(tmp_path: Path) -> None:
    config = ExtrapConfig.preset("extrap-past", step_ratio=0.5, seed=42)

    def wrap(model: nn.Module) -> Extrapolated:
        return Extrapolated(torch.optim.SGD(model.parameters(), lr=0.05), config)

    given = trained(tmp_path, "none", optimizers=wrap)
    ours = trained(tmp_path, "extrap-past", extrap_step_ratio=0.5)
    assert torch.equal(weights(given), weights(ours)) and given.extrap_config == config
    with pytest.raises(ValueError, match=r"^extrap is 'extrap-past' and optimizers holds an Extrapolated already; "):
        make(tmp_path, "extrap-past", optimizers=wrap)
    with pytest.raises(ValueError, match=r"^extrap_virtual_workers is 2 and optimizers holds an Extrapolated of 1; "):
        make(tmp_path, "none", optimizers=wrap, extrap_virtual_workers=2)


def test_noisy_embeddings_need_embeddings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^neftune_noise_alpha is 5.0 and the model is a \w+, which has no input emb"):
        model = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
        make(tmp_path, "none", model=model, neftune_noise_alpha=5.0)


class Lomo(torch.optim.Optimizer):
    """A stand-in for lomo_optim's: each parameter is stepped in a hook of the backward pass."""

    def __init__(self, model: Any, lr: float) -> None:
        self.model = model
        super().__init__(model.parameters(), {"lr": lr})

    def fused_backward(self, loss: Tensor, lr: float) -> None:
        for p, grad in zip(
            self.model.parameters(), torch.autograd.grad(loss, list(self.model.parameters())), strict=True
        ):
            p.data.sub_(lr * grad)

    def optimizer_step(self, lr: float) -> None: ...

    step = zero_grad = lambda self, *args, **kwargs: None  # type: ignore[assignment]


def test_lomo_stays_bare_and_is_refused_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lomo_optim")
    module.Lomo = Lomo  # type: ignore[attr-defined]
    module.AdaLomo = type("AdaLomo", (Lomo,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lomo_optim", module)
    for place in ("accelerate.accelerator", "accelerate.optimizer"):
        monkeypatch.setattr(f"{place}.is_lomo_available", lambda: True)
    monkeypatch.setattr("transformers.trainer_optimizer.is_lomo_available", lambda: True)
    stock, none = trained(tmp_path, None, optim="lomo"), trained(tmp_path, "none", optim="lomo")
    assert torch.equal(weights(none), weights(stock)) and not torch.equal(
        weights(none), weights(make(tmp_path, "none"))
    )
    assert none.extrapolated is None
    with pytest.raises(ValueError, match="^base is Lomo, which steps inside the backward pass; allowed: "):
        trained(tmp_path, "extrap-past", optim="lomo")


@pytest.mark.parametrize(
    "extrap", [*(pytest.param(extrap, marks=pytest.mark.matrix) for extrap in (None, "none")), "extrap-past"]
)
def test_a_checkpoint_at_sigterm(extrap: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' `enable_jit_checkpoint`."""
    before = signal.getsignal(signal.SIGTERM)

    class Terminate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    class Now:
        def __init__(self, seconds: float, call: Callable[[], None]) -> None:
            self.start = call

    monkeypatch.setattr("transformers.trainer_jit_checkpoint.threading.Timer", Now)
    try:
        trainer = make(tmp_path, extrap, enable_jit_checkpoint=True)
        trainer.add_callback(Terminate())
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(tmp_path.rglob("checkpoint-is-incomplete.txt"))
    resumed = trained(tmp_path, extrap, resume=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 6


@pytest.mark.parametrize("extrap", ["none", "extrap-past"])
def test_liger_without_its_package_is_refused_in_its_own_words(extrap: str, tmp_path: Path) -> None:
    errors = []
    for kind in (None, extrap):
        with pytest.raises(ImportError) as error:
            trained(tmp_path, kind, use_liger_kernel=True)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
