"""Extrapolation in an Accelerate loop; the lines with `extrapolated` are the additional ones.

python examples/plain_loop.py
torchrun --nproc_per_node 2 examples/plain_loop.py
"""

from __future__ import annotations

import argparse
from itertools import chain, repeat
from pathlib import Path
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.distributed import let_gloo_finish
from hf_extrap.training.accelerate_state import register_directions

CONTEXT = 16


def make_data() -> tuple[TensorDataset, int]:
    """16 bytes of Python's documentation and the next byte, (windows, 16) and (windows,); and the number of classes."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()[:200_000]
    values = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    windows = values.unfold(0, CONTEXT + 1, 3)
    return TensorDataset(windows[:, :-1].contiguous(), windows[:, -1].contiguous()), 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="extrap")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=512, help="batch size per process")
    parser.add_argument("--state", default="", help="folder: begin with its state if it exists, and save it at the end")
    arguments = parser.parse_args()

    # Without `cpu=True`, processes without an accelerator would not form a process group.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(0)
    dataset, vocabulary = make_data()
    model = nn.Sequential(
        nn.Embedding(vocabulary, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256), nn.ReLU(), nn.Linear(256, vocabulary)
    )
    base = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    loader = DataLoader(dataset, batch_size=arguments.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(
        model, Extrapolated(base, ExtrapConfig.preset(arguments.preset)), loader
    )
    extrapolated = optimizer.optimizer  # inside Accelerate's wrapper
    register_directions(accelerator, optimizer)  # save_state keeps those of every process
    if arguments.state and Path(arguments.state).is_dir():
        accelerator.load_state(arguments.state)

    first = last = float("nan")
    for step, (inputs, targets) in zip(range(arguments.steps), chain.from_iterable(repeat(loader)), strict=False):
        if extrapolated.wants_probe:
            with extrapolated.probing():
                accelerator.backward(nn.functional.cross_entropy(model(inputs), targets))
        extrapolated.train()  # x -> y
        loss = nn.functional.cross_entropy(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()  # y -> x, then the base optimizer's step
        optimizer.zero_grad()
        last = accelerator.reduce(loss.detach(), "mean").item()
        first = last if step == 0 else first
    if arguments.state:
        accelerator.save_state(arguments.state)
    accelerator.print(f"loss at y, step 1: {first:.3f}, step {arguments.steps}: {last:.3f}")
    let_gloo_finish()
    accelerator.end_training()


if __name__ == "__main__":
    main()
