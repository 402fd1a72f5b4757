"""Run by torchrun: ExtrapTrainer under DDP; a process leaves ddp_trainer_R.pt in the folder given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from hf_extrap import ExtrapTrainer, ExtrapTrainingArguments
from tests.support.leaving import save_and_leave
from tests.support.tiny_trainer import Sentences, arguments, gpt2, weights

COMMON: dict[str, Any] = {"max_grad_norm": 0.5, "sgd_momentum": 0.9, "sgd_nesterov": True}
PRESETS = ["none", "extrap", "extrap-past", "extragradient", "optimistic", "past-update"]
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
CELLS: list[tuple[str, str]] = [
    # Without extrapolation the stock Trainer weighs every token alike, and so the processes of an uneven batch.
    ("none", "accumulated"),
    *((preset, way) for preset in PRESETS[1:] for way in ("accumulated", "virtual workers", "uneven")),
    *((preset, "find_unused_parameters") for preset in ("extrap", "optimistic")),
    *((preset, "static_graph") for preset in ("extrap", "extrap-past", "extragradient")),
]


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


def train(folder: Path, preset: str, hooked: bool = False, **fields: Any) -> dict[str, Any]:
    args = arguments(folder / "out", ExtrapTrainingArguments, extrap=preset, **{**COMMON, **fields})
    rows = UNEVEN_ROWS if "accelerator_config" in fields else ROWS
    trainer = RecordingTrainer(gpt2(), args, train_dataset=Sentences(rows))
    trainer.sentences, trainer.calls, trainer.hooked = [], [], hooked
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) and trainer.args.world_size == 2
    return {"weights": weights(trainer), "sentences": trainer.sentences, "calls": trainer.calls}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for preset, way in CELLS:
        try:
            seen[f"{preset}, {way}"] = train(folder, preset, **WAYS[way])
        except RuntimeError as error:
            seen[f"{preset}, {way}"] = {"error": str(error)}
    for preset in ("extrap", "extrap-past"):
        seen[f"{preset}, hook"] = train(folder, preset, hooked=True, gradient_accumulation_steps=2)
    save_and_leave(seen, folder, "ddp_trainer")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
