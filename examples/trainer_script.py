"""A Trainer script with `ExtrapTrainer`: trains a tiny GPT-2 from scratch on bytes of Python's documentation.

python examples/trainer_script.py --extrap extrap
torchrun --nproc_per_node 2 examples/trainer_script.py --extrap extrap-past
"""

from __future__ import annotations

import math
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, default_data_collator

from hf_extrap import ExtrapTrainer, ExtrapTrainingArguments

CONTEXT = 64


def make_data() -> list[dict[str, list[int]]]:
    """Blocks of 64 bytes of Python's documentation."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()[:120_000]
    blocks = [list(text[i : i + CONTEXT]) for i in range(0, len(text) - CONTEXT, CONTEXT)]
    return [{"input_ids": block, "labels": block} for block in blocks]


def main() -> None:
    parser = HfArgumentParser(ExtrapTrainingArguments, description=__doc__)
    parser.set_defaults(
        output_dir="runs/trainer_script",
        extrap="extrap",  # "none" equals the stock Trainer bit for bit
        extrap_virtual_workers=4,
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        warmup_steps=5,
        logging_steps=20,
        save_strategy="no",
        use_cpu=not torch.accelerator.is_available(),
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    data = make_data()
    held_out = len(data) // 10
    shape = {"n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 2}
    trainer = ExtrapTrainer(
        GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **shape)),
        arguments,
        train_dataset=data[:-held_out],
        eval_dataset=data[-held_out:],
        data_collator=default_data_collator,
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if arguments.process_index == 0:
        print(f"perplexity per byte at x: {math.exp(loss):.2f}; a uniform guess has 256")


if __name__ == "__main__":
    main()
