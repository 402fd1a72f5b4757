"""Extrapolation in any Trainer: TRL's `SFTTrainer` with two class definitions. Requires `pip install trl`.

python examples/trl_sft.py --extrap extrap-past
"""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_extrap import ExtrapTrainerMixin
from hf_extrap.training.arguments import ExtrapArguments


@dataclass
class ExtrapSFTConfig(ExtrapArguments, SFTConfig):
    """`SFTConfig` with the `extrap` fields."""


class ExtrapSFTTrainer(ExtrapTrainerMixin, SFTTrainer):
    """`SFTTrainer` that takes gradients at the extrapolated point."""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE tokenizer, so that nothing is downloaded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=["<eos>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


def main() -> None:
    parser = HfArgumentParser(ExtrapSFTConfig, description=__doc__)
    parser.set_defaults(
        output_dir="runs/trl_sft",
        extrap="extrap",  # "none" equals the stock SFTTrainer
        extrap_virtual_workers=2,
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        max_length=128,
        logging_steps=5,
        save_strategy="no",
        bf16=False,
        activation_checkpointing=False,
        use_cpu=not torch.accelerator.is_available(),
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    texts = [topics[name] for name in sorted(topics)]
    tokenizer = make_tokenizer(texts)
    size = {"n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **size))
    data = Dataset.from_dict({"text": texts})
    trainer = ExtrapSFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss at y: {losses[0]:.2f} in the first steps, {losses[-1]:.2f} in the last")


if __name__ == "__main__":
    main()
