"""Other libraries' Trainers with `ExtrapTrainerMixin`: with `none` theirs bit for bit, under extrap-past they train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from hf_extrap import ExtrapTrainerMixin
from hf_extrap.training.arguments import ExtrapArguments

trl = pytest.importorskip("trl", reason="TRL is not installed (extra test)")
pytestmark = pytest.mark.filterwarnings("ignore")
SENTENCES = [f"the {a} {b} the {c}" for a in ("cat", "dog") for b in ("sees", "hears", "likes") for c in ("sun", "sea")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.WordLevel(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<eos>", "<pad>"]
    bpe.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    words = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **words)


def gpt2(tokenizer: Any, kind: Any = GPT2LMHeadModel, **fields: Any) -> Any:
    torch.manual_seed(0)
    size = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    return kind(GPT2Config(**size, **ends, **fields))


def pairs() -> Dataset:
    prompts = [sentence.rsplit(" ", 1)[0] for sentence in SENTENCES]
    return Dataset.from_dict(
        {"prompt": prompts, "chosen": [" sun"] * len(prompts), "rejected": [" sea"] * len(prompts)}
    )


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(text.count("sun")) - 0.1 * len(text.split()) for text in completions]


def sft(tokenizer: Any) -> tuple[Any, ...]:
    data = Dataset.from_dict({"text": SENTENCES})
    return "SFT", gpt2(tokenizer), {"max_length": 16}, {"train_dataset": data}


def lora(tokenizer: Any, **options: Any) -> tuple[Any, ...]:
    peft = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", **options)
    name, model, fields, words = sft(tokenizer)
    return name, model, fields, {**words, "peft_config": peft}


def dora(tokenizer: Any) -> tuple[Any, ...]:
    return lora(tokenizer, use_dora=True)


def dpo(tokenizer: Any) -> tuple[Any, ...]:
    words = {"train_dataset": pairs(), "ref_model": gpt2(tokenizer)}
    return "DPO", gpt2(tokenizer), {"max_length": 16}, words


def reward(tokenizer: Any) -> tuple[Any, ...]:
    model = gpt2(tokenizer, GPT2ForSequenceClassification, num_labels=1)
    return "Reward", model, {"max_length": 16}, {"train_dataset": pairs()}


def grpo(tokenizer: Any) -> tuple[Any, ...]:
    fields = {"num_generations": 2, "max_completion_length": 4}
    data = pairs().select_columns(["prompt"])
    return "GRPO", gpt2(tokenizer), fields, {"train_dataset": data, "reward_funcs": length_reward}


THREE_STEPS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("make", [sft, lora, dora, dpo, reward, grpo], ids=lambda make: make.__name__)
def test_trl(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    ends = {}
    for extrap in (None, "none", "extrap-past"):
        name, model, fields, words = make(tokenizer)
        trainer_kind, config_kind = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
        if extrap is not None:
            trainer_kind = type("Extrap", (ExtrapTrainerMixin, trainer_kind), {})
            config_kind = dataclass(type("ExtrapConfig", (ExtrapArguments, config_kind), {"__annotations__": {}}))
            fields = {**fields, "extrap": extrap}
        args = config_kind(
            output_dir=str(tmp_path / str(extrap)),
            bf16=False,
            **THREE_STEPS,
            **fields,
        )
        trainer = trainer_kind(model=model, args=args, processing_class=tokenizer, **words)
        trainer.train()
        ends[extrap] = flat(trainer.model)
        assert trainer.state.global_step == 3 and torch.isfinite(ends[extrap]).all()
        if extrap == "extrap-past":
            assert trainer.extrapolated.step_count == 3 and trainer.extrapolated.skipped_steps == 0
            assert trainer.state.log_history[1]["extrap/displacement_norm"] > 0
    assert torch.equal(ends[None], ends["none"])
    assert not torch.equal(ends["none"], ends["extrap-past"])


def encoder(tokenizer: Any, folder: Path) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed (extra test)")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # A folder with a bare encoder gets mean pooling.
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def test_sentence_transformers(tokenizer: Any, tmp_path: Path) -> None:
    encoder(tokenizer, tmp_path / "model")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    @dataclass
    class Arguments(ExtrapArguments, SentenceTransformerTrainingArguments):
        """With the extrap fields."""

    class Ours(ExtrapTrainerMixin, SentenceTransformerTrainer):
        """With extrapolation."""

    data, ends = Dataset.from_dict({"anchor": SENTENCES, "positive": SENTENCES[::-1]}), {}
    for extrap in (None, "none", "extrap-past"):
        model = encoder(tokenizer, tmp_path / "model")
        kind, arguments, field = (SentenceTransformerTrainer, SentenceTransformerTrainingArguments, {})
        if extrap is not None:
            kind, arguments, field = Ours, Arguments, {"extrap": extrap}
        args = arguments(
            output_dir=str(tmp_path / str(extrap)),
            **THREE_STEPS,
            **field,
        )
        trainer = kind(model=model, args=args, train_dataset=data, loss=MultipleNegativesRankingLoss(model))
        trainer.train()
        ends[extrap] = flat(trainer.model)
    assert trainer.extrapolated.step_count == 3
    assert torch.equal(ends[None], ends["none"]) and not torch.equal(ends["none"], ends["extrap-past"])


def test_setfit(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Trainer makes one of sentence-transformers by the names of two classes, which are replaced by ours."""
    try:
        import setfit
        import setfit.trainer as inside
    except ImportError as error:
        pytest.skip(f"setfit cannot be imported: {error}")
    ends = {}
    stock_trainer, stock_arguments = inside.BCSentenceTransformersTrainer, inside.SentenceTransformerTrainingArguments
    for extrap in (None, "none", "extrap-past"):
        if extrap is not None:
            fields = {"__annotations__": {"extrap": str}, "extrap": extrap}
            ours = dataclass(type("Arguments", (ExtrapArguments, stock_arguments), fields))
            trainer = type("Ours", (ExtrapTrainerMixin, stock_trainer), {})
            monkeypatch.setattr(inside, "SentenceTransformerTrainingArguments", ours)
            monkeypatch.setattr(inside, "BCSentenceTransformersTrainer", trainer)
        body = encoder(tokenizer, tmp_path / "model")
        model = setfit.SetFitModel(model_body=body, model_head=setfit.SetFitHead(16, 2), labels=["cat", "dog"])
        labels = [int("dog" in sentence) for sentence in SENTENCES]
        data = Dataset.from_dict({"text": SENTENCES, "label": labels})
        args = setfit.TrainingArguments(output_dir=str(tmp_path), max_steps=3, batch_size=4, seed=1, save_strategy="no")
        runner = setfit.Trainer(model=model, args=args, train_dataset=data)
        inner = runner.st_trainer
        runner.train_embeddings(SENTENCES, labels, args=args)
        ends[extrap] = flat(body)
        assert inner.state.global_step == 3
    assert inner.extrapolated.step_count == 3
    assert torch.equal(ends[None], ends["none"]) and not torch.equal(ends["none"], ends["extrap-past"])
