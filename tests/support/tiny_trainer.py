"""A toy language model and its Trainer, shared by the tests of this folder and by the processes they start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel, Trainer, TrainingArguments

from hf_extrap import ExtrapTrainer, ExtrapTrainingArguments

VOCABULARY = 50
NESTEROV: dict[str, Any] = {
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.5,
    "sgd_momentum": 0.9,
    "sgd_nesterov": True,
}
"""Fields of runs that are compared between one process and several."""


class Sentences(Dataset):
    """Random tokens, small ones more often: rows of `input_ids` and equal `labels`."""

    def __init__(self, rows: int, length: int = 12) -> None:
        shares = torch.rand(rows, length, generator=torch.Generator().manual_seed(1))
        self.rows = (shares**3 * VOCABULARY).long()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    """The same weights at every call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0))


def marian() -> MarianMTModel:
    """A model that takes `num_items_in_batch` and ignores it."""
    torch.manual_seed(0)
    return MarianMTModel(
        MarianConfig(
            vocab_size=VOCABULARY,
            decoder_vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=16,
            dropout=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            forced_eos_token_id=None,
        )
    )


def arguments(folder: Path | str, kind: type[TrainingArguments] = ExtrapTrainingArguments, **fields: Any) -> Any:
    """Quiet arguments for a few steps on the CPU."""
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "linear",
    }
    return kind(output_dir=str(folder), **{**defaults, **fields})


def make(folder: Path | str, kind: type[Trainer] = ExtrapTrainer, model: Any = None, **fields: Any) -> Trainer:
    """A trainer of the toy model."""
    argument_kind = ExtrapTrainingArguments if issubclass(kind, ExtrapTrainer) else TrainingArguments
    callbacks = fields.pop("callbacks", None)
    return kind(
        model if model is not None else gpt2(),
        arguments(folder, argument_kind, **fields),
        train_dataset=Sentences(64),
        eval_dataset=Sentences(16),
        callbacks=callbacks,
    )


def train(folder: Path | str, kind: type[Trainer] = ExtrapTrainer, resume: Any = None, **fields: Any) -> Trainer:
    """Train and give back the trainer."""
    trainer = make(folder, kind, **fields)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Trainer) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])


class Warnings(logging.Handler):
    """Keeps the text of every warning since it was created."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("hf_extrap").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
