"""ExtrapTrainer under DDP in two processes: the stock Trainer without extrapolation, virtual workers, resumes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from hf_extrap import PRESETS, ExtrapConfig, ExtrapTrainer, ExtrapTrainingArguments
from hf_extrap.optim.reference import Loss, extrapolate
from tests.support.marks import each
from tests.support.tiny_trainer import NESTEROV, Sentences, Warnings, arguments, gpt2, make, marian, train, weights

pytestmark = pytest.mark.distributed

Ranks = list[dict[str, Any]]


# The checkpoint lies between two logged rows.
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 4}
MEASURED: dict[str, Any] = {"extrap": "extrap-past", "eval_strategy": "steps", "eval_steps": 3}
FEW_EQUIVALENT = [("none", 1), ("extrap", 1), ("extrap-past", 1), ("extrap-past", 2), ("past-update", 2)]
EQUIVALENT = {
    "few": FEW_EQUIVALENT,
    "matrix": [
        (name, steps)
        for name in PRESETS
        for steps in (1, 2)
        if name not in ("gaussian", "smoothout") and (name, steps) not in FEW_EQUIVALENT
    ],
}
"""Presets and virtual workers of each process."""
EVALUATED = {"few": ["extrap"], "matrix": ["extragradient"]}
RESUMED = {"few": ["extrap-past"], "matrix": ["smoothout"]}
HOOKED = {"few": ["extrap-past"], "matrix": ["extrap"]}


class LateFiles(TrainerCallback):
    """The second process saves its own files late, and records whether the checkpoint counts as complete before."""

    is_complete = False

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        wrapper = optimizer.optimizer
        local_state_dict = wrapper.local_state_dict

        def late() -> dict[str, Any]:
            if args.process_index == 1:
                time.sleep(2)
                self.is_complete |= any(Path(args.output_dir).glob("*/trainer_state.json"))
            return local_state_dict()

        wrapper.local_state_dict = late


WORKERS = ["extrap", "extrap-past", "extragradient", "optimistic", "past-update"]
WAYS: dict[str, dict[str, Any]] = {
    # One gradient of each process, from two micro-batches.
    "accumulated": {"gradient_accumulation_steps": 2},
    # Each micro-batch a worker.
    "virtual workers": {"gradient_accumulation_steps": 2, "extrap_virtual_workers": 2},
    # The last batch of an epoch has four sentences in one process and two in the other.
    "uneven": {"accelerator_config": {"even_batches": False}, "max_steps": 9},
    "find_unused_parameters": {"ddp_find_unused_parameters": True},
    "static_graph": {"ddp_static_graph": True},
}
UNEVEN_ROWS, ROWS = 62, 64
FEW_CELLS = [
    # Without extrapolation the stock Trainer weighs every token alike, and so the processes of an uneven batch.
    ("none", "accumulated"),
    *(("extrap-past", way) for way in ("accumulated", "virtual workers", "uneven")),
    *(("extragradient", way) for way in ("accumulated", "virtual workers")),
    ("optimistic", "find_unused_parameters"),
    ("extrap", "static_graph"),
]
ALL_CELLS = [
    *((preset, way) for preset in WORKERS for way in ("accumulated", "virtual workers", "uneven")),
    ("extrap", "find_unused_parameters"),
    *((preset, "static_graph") for preset in ("extrap-past", "extragradient")),
]
CELLS = {"few": FEW_CELLS, "matrix": [cell for cell in ALL_CELLS if cell not in FEW_CELLS]}


class RecordingTrainer(ExtrapTrainer):
    """Keeps the sentences of every step, by micro-batch, and can have a user's communication hook."""

    hooked = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.sentences.append([inputs["input_ids"].clone() for inputs in batches])
        return batches, count

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.hooked and not self.calls:
            self.calls.append(0)

            def counted(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
                self.calls[0] += 1
                return bf16_compress_hook(state, bucket)

            model.register_comm_hook(None, counted)
        return super().training_step(model, *args, **kwargs)


def train_recording(folder: Path, preset: str, hooked: bool = False, **fields: Any) -> dict[str, Any]:
    args = arguments(folder / "out", ExtrapTrainingArguments, extrap=preset, **{**NESTEROV, **fields})
    rows = UNEVEN_ROWS if "accelerator_config" in fields else ROWS
    trainer = RecordingTrainer(gpt2(), args, train_dataset=Sentences(rows))
    trainer.sentences, trainer.calls, trainer.hooked = [], [], hooked
    trainer.train()
    check(trainer)
    return {"weights": weights(trainer), "sentences": trainer.sentences, "calls": trainer.calls}


def check(trainer: Trainer) -> None:
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) and trainer.args.world_size == 2


def losses(trainer: Trainer) -> list[float]:
    """The logged losses, the mean of the whole run last."""
    return [row[key] for row in trainer.state.log_history for key in ("loss", "train_loss") if key in row]


def in_processes(folder: Path, which: str, single_process_checkpoint: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for preset, steps in EQUIVALENT[which]:
        fields = {"extrap": preset, "extrap_virtual_workers": steps}
        trainer = train(folder / "equivalent", **fields, **NESTEROV)
        check(trainer)
        seen[f"{preset} {steps}"] = weights(trainer)
        seen[f"{preset} {steps} logs"] = [row for row in trainer.state.log_history if "loss" in row]
    for preset in EVALUATED[which]:
        busy = train(folder / "busy", extrap=preset, eval_strategy="steps", eval_steps=2, **NESTEROV)
        seen[f"{preset} with evaluations"] = weights(busy)
    for preset in RESUMED[which]:
        seen |= resumed_run(folder, preset)
    for preset, way in CELLS[which]:
        try:
            seen[f"{preset}, {way}"] = train_recording(folder, preset, **WAYS[way])
        except RuntimeError as error:
            seen[f"{preset}, {way}"] = {"error": str(error)}
    for preset in HOOKED[which]:
        seen[f"{preset}, hook"] = train_recording(folder, preset, hooked=True, gradient_accumulation_steps=2)
    if which == "few":
        seen |= beyond_presets(folder, single_process_checkpoint)
    return seen


def resumed_run(folder: Path, preset: str) -> dict[str, Any]:
    """A run, the same one from its checkpoint, and from the checkpoint of its last step."""
    seen: dict[str, Any] = {}
    warnings = Warnings()
    fields = {"extrap": preset, "extrap_virtual_workers": 2, **NESTEROV, **SAVING}
    whole = train(folder / preset, model=gpt2(dropout=0.1), **fields)
    seen[f"{preset} whole"], seen[f"{preset} whole losses"] = weights(whole), losses(whole)
    checkpoint = str(folder / preset / "checkpoint-3")
    resumed = train(folder / f"{preset}-resumed", model=gpt2(dropout=0.1), resume=checkpoint, **fields)
    seen[f"{preset} resumed"], seen[f"{preset} resumed losses"] = weights(resumed), losses(resumed)
    checkpoint = str(folder / preset / "checkpoint-6")
    finished = train(folder / f"{preset}-resumed", model=gpt2(dropout=0.1), resume=checkpoint, **fields)
    seen[f"{preset} finished"], seen[f"{preset} finished steps"] = weights(finished), finished.state.global_step
    assert not warnings.texts, warnings.texts
    return seen


def beyond_presets(folder: Path, single_process_checkpoint: str) -> dict[str, Any]:
    """The stock Trainer, scales of gradients, evaluations, sharpness, checkpoints that are late, torn or another's."""
    seen: dict[str, Any] = {}
    stock = {"optim": "adamw_torch", "max_grad_norm": 0.5}
    seen["stock"] = weights(train(folder / "stock", kind=Trainer, model=gpt2(dropout=0.1), **stock))
    seen["none"] = weights(train(folder / "none", model=gpt2(dropout=0.1), **stock))
    for extrap in ("none", "extrap-past"):
        scale = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 1}
        trainer = train(folder / "scale", model=marian(), extrap=extrap, **scale, train_sampling_strategy="sequential")
        seen[f"gradient norm {extrap}"] = trainer.state.log_history[0]["grad_norm"]
    evaluated = make(folder / "evaluated", extrap="extrap-past", **NESTEROV)
    evaluated.evaluate()
    evaluated.train()
    check(evaluated)
    seen["evaluated first"] = weights(evaluated)
    measured = train(folder / "measured", sharpness_batches=1, **MEASURED, **NESTEROV)
    seen["sharpness"] = [row["extrap/sharpness"] for row in measured.state.log_history if "extrap/sharpness" in row]
    seen["measured"] = weights(measured)
    warnings = Warnings()
    late = LateFiles()
    train(folder / "late", extrap="extrap-past", **NESTEROV, **SAVING, callbacks=[late], max_steps=3)
    seen["complete too early"] = late.is_complete
    torn = folder / "torn" / "checkpoint-3"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "extrap-past" / "checkpoint-3", torn)
        (torn / "extrap_rank_1.safetensors").unlink()
    dist.barrier()
    try:
        train(folder / "torn", extrap="extrap-past", resume=str(torn), **NESTEROV, **SAVING)
    except ValueError as error:
        seen["torn"] = str(error)
    assert not warnings.texts, warnings.texts
    grown = train(folder / "grown", extrap="extrap-past", resume=single_process_checkpoint, **NESTEROV, **SAVING)
    seen["grown"], seen["grown steps"], seen["warnings"] = weights(grown), grown.state.global_step, warnings.texts
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ranks_of(folder: Path, run_processes: Callable[..., Any]) -> Callable[[str], Ranks]:
    """What the two processes saw; one launch for the few, one for the matrix."""
    train(folder / "alone", extrap="extrap-past", max_steps=3, **NESTEROV, **SAVING)

    @cache
    def launched(which: str) -> Ranks:
        return run_processes(__name__, folder, which, folder / "alone" / "checkpoint-3")

    return launched


@pytest.fixture(scope="module")
def ranks(ranks_of: Callable[[str], Ranks]) -> Ranks:
    return ranks_of("few")


@pytest.mark.parametrize("which", ["few", pytest.param("matrix", marks=pytest.mark.matrix)])
def test_replicas_end_bit_identical(ranks_of: Callable[[str], Ranks], which: str) -> None:
    ranks = ranks_of(which)
    names = [name for name, value in ranks[0].items() if isinstance(value, torch.Tensor)]
    assert len(names) >= 14
    for name in names:
        assert torch.equal(ranks[0][name], ranks[1][name]), name


@each(EQUIVALENT, "preset,steps")
def test_two_processes_are_two_virtual_workers(
    ranks_of: Callable[[str], Ranks], tmp_path: Path, preset: str, steps: int, which: str
) -> None:
    ranks = ranks_of(which)
    alone = train(tmp_path, extrap=preset, extrap_virtual_workers=2 * steps, **NESTEROV)
    torch.testing.assert_close(weights(alone), ranks[0][f"{preset} {steps}"], rtol=1e-4, atol=1e-6)
    rows = zip(alone.state.log_history, ranks[0][f"{preset} {steps} logs"], strict=False)
    for row, other in rows:
        for name in ("loss", "extrap/displacement_norm", "extrap/step_size", "extrap/gradient_noise_scale"):
            assert other[name] == pytest.approx(row[name], rel=1e-2, abs=1e-9), name


@each(EVALUATED, "preset")
def test_evaluations_change_nothing(ranks_of: Callable[[str], Ranks], preset: str, which: str) -> None:
    assert torch.equal(ranks_of(which)[0][f"{preset} with evaluations"], ranks_of(which)[0][f"{preset} 1"])


def test_an_evaluation_before_training_changes_nothing(ranks: Ranks) -> None:
    """The stock Trainer does not wrap a model for DDP that it has evaluated."""
    assert torch.equal(ranks[0]["evaluated first"], ranks[0]["extrap-past 1"])


def test_none_is_bit_identical_to_the_stock_trainer(ranks: Ranks) -> None:
    assert torch.equal(ranks[0]["none"], ranks[0]["stock"])


@pytest.mark.parametrize("extrap", ["none", "extrap-past"])
def test_neither_accumulation_nor_world_size_scales_the_gradient(ranks: Ranks, tmp_path: Path, extrap: str) -> None:
    fields = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential", "max_steps": 1}
    alone = train(tmp_path, model=marian(), extrap=extrap, **fields)
    norm = alone.state.log_history[0]["grad_norm"]
    assert ranks[0][f"gradient norm {extrap}"] == pytest.approx(norm, rel=1e-4)


@each(RESUMED, "preset")
def test_a_resumed_run_is_bit_identical(
    ranks_of: Callable[[str], Ranks], folder: Path, preset: str, which: str
) -> None:
    ranks = ranks_of(which)
    assert torch.equal(ranks[0][f"{preset} resumed"], ranks[0][f"{preset} whole"])
    assert ranks[0][f"{preset} resumed losses"] == ranks[0][f"{preset} whole losses"]
    assert torch.equal(ranks[0][f"{preset} finished"], ranks[0][f"{preset} whole"])
    assert ranks[0][f"{preset} finished steps"] == 6
    files = sorted(path.name for path in (folder / preset / "checkpoint-3").glob("extrap_rank_*"))
    assert files == ["extrap_rank_0.safetensors", "extrap_rank_1.safetensors"]


def test_a_checkpoint_is_complete_when_every_process_has_saved(ranks: Ranks) -> None:
    assert not ranks[1]["complete too early"]
    assert ["is damaged: extrap_rank_1.safetensors is missing" in rank["torn"] for rank in ranks] == [True, True]


def test_another_world_size_warns_and_starts_cold(
    ranks: Ranks, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ranks[0]["grown steps"] == 6
    assert any("world_size was 1 and is 2" in text for text in ranks[0]["warnings"])
    fields = {"extrap": "extrap-past", "extrap_virtual_workers": 2, **NESTEROV, **SAVING}
    shrunk = train(tmp_path, resume=str(folder / "extrap-past" / "checkpoint-3"), **fields)
    assert shrunk.state.global_step == 6
    assert "the checkpoint has 2 processes and this run 1" in caplog.text


def test_sharpness_is_that_of_the_mean_over_processes(ranks: Ranks, tmp_path: Path) -> None:
    alone = train(tmp_path, extrap_virtual_workers=2, sharpness_batches=2, **MEASURED, **NESTEROV)
    expected = [row["extrap/sharpness"] for row in alone.state.log_history if "extrap/sharpness" in row]
    assert len(expected) == 2
    assert ranks[0]["sharpness"] == ranks[1]["sharpness"] == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(weights(alone), ranks[0]["measured"], rtol=1e-4, atol=1e-6)


def textbook(preset: str, workers: list[list[list[Tensor]]]) -> Tensor:
    """The reference's weights after training: a worker's batches by step, its gradient the mean over a step's."""
    model = gpt2().train()
    names, steps = [name for name, _ in model.named_parameters()], len(workers[0])

    def loss_of(batches: list[list[Tensor]]) -> Loss:
        def loss(point: list[Tensor], step: int, probe: bool) -> Tensor:
            by_name = dict(zip(names, point, strict=True))
            losses = [
                torch.func.functional_call(model, by_name, kwargs={"input_ids": rows, "labels": rows}).loss
                for rows in batches[step]
            ]
            return torch.stack(losses).mean()

        return loss

    run = extrapolate(
        list(model.parameters()),
        [loss_of(batches) for batches in workers],
        lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
        ExtrapConfig.preset(preset),
        steps,
        schedule=lambda optimizer: LambdaLR(optimizer, lambda t: (steps - t) / steps),
        max_grad_norm=NESTEROV["max_grad_norm"],
    )
    return torch.cat([p.reshape(-1) for p in run.x[-1]])


@each(CELLS, "preset,way")
def test_two_processes_are_the_textbook(preset: str, way: str, which: str, ranks_of: Callable[[str], Ranks]) -> None:
    ranks = [rank[f"{preset}, {way}"] for rank in ranks_of(which)]
    assert "error" not in ranks[0], ranks[0]["error"]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    workers = [rank["sentences"] for rank in ranks]
    if way == "virtual workers":
        workers = [[[step[v]] for step in rank["sentences"]] for v in range(2) for rank in ranks]
    if way in ("accumulated", "virtual workers"):
        assert all(len(step) == 2 for rank in ranks for step in rank["sentences"])
    if way == "uneven":
        assert [[len(rows) for rows in step] for step in ranks[1]["sentences"]][7] == [2]
        assert len(ranks[0]["sentences"][7][0]) == 4
    torch.testing.assert_close(ranks[0]["weights"], textbook(preset, workers), rtol=1e-4, atol=1e-6)


@each(
    {which: [preset for preset, way in cells if way == "virtual workers"] for which, cells in CELLS.items()}, "preset"
)
def test_the_field_decides_what_a_worker_is(preset: str, which: str, ranks_of: Callable[[str], Ranks]) -> None:
    """Alike for directions of all; local ones differ, a virtual worker's coming from one micro-batch."""
    rank = ranks_of(which)[0]
    accumulated, virtual = (rank[f"{preset}, {way}"]["weights"] for way in ("accumulated", "virtual workers"))
    if ExtrapConfig.preset(preset).is_local:
        assert float((accumulated - virtual).abs().max()) > 1e-5
    else:
        torch.testing.assert_close(accumulated, virtual, rtol=1e-4, atol=1e-6)


@each(HOOKED, "preset")
def test_a_communication_hook_is_called_once_a_step(preset: str, which: str, ranks_of: Callable[[str], Ranks]) -> None:
    ranks = ranks_of(which)
    hooked = [rank[f"{preset}, hook"] for rank in ranks]
    assert [rank["calls"] for rank in hooked] == [[6], [6]]
    assert torch.equal(hooked[0]["weights"], hooked[1]["weights"])
    off = (hooked[0]["weights"] - ranks[0][f"{preset}, accumulated"]["weights"]).abs().max()
    assert 1e-6 < float(off) < 1e-3
