"""A Trainer script with `ExtrapTrainer`: trains a tiny GPT-2 from scratch on bytes of Python's documentation.

python examples/trainer_script.py --extrap extrap
torchrun --nproc_per_node 2 examples/trainer_script.py --extrap extrap-past
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator

from hf_extrap import ExtrapTrainer, ExtrapTrainingArguments

CONTEXT = 64


def make_data() -> list[dict[str, list[int]]]:
    """Blocks of 64 bytes of Python's documentation."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()[:120_000]
    blocks = [list(text[i : i + CONTEXT]) for i in range(0, len(text) - CONTEXT, CONTEXT)]
    return [{"input_ids": block, "labels": block} for block in blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extrap", default="extrap", help="preset; none equals the stock Trainer bit for bit")
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--output_dir", default=None)
    given = parser.parse_args()

    data = make_data()
    held_out = len(data) // 10
    with tempfile.TemporaryDirectory() as folder:
        arguments = ExtrapTrainingArguments(
            output_dir=given.output_dir or folder,
            extrap=given.extrap,
            max_steps=given.max_steps,
            per_device_train_batch_size=16,
            extrap_virtual_workers=4,
            learning_rate=3e-3,
            warmup_steps=5,
            logging_steps=20,
            save_strategy="no",
            use_cpu=not torch.accelerator.is_available(),
        )
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
            )
        )
        trainer = ExtrapTrainer(
            model,
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
