"""Extrapolation in a DeepSpeed loop: `Extrapolated` is the client optimizer, and is connected to the engine.

torchrun --nproc_per_node 2 examples/deepspeed_loop.py --stage 2
torchrun --nproc_per_node 2 examples/deepspeed_loop.py --stage 3 --preset extragradient
"""

from __future__ import annotations

import argparse
import os
from pydoc_data.topics import topics

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # must be set before DeepSpeed is imported

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.distributed import let_gloo_finish

CONTEXT, BATCH = 16, 256


def make_data() -> Tensor:
    """Windows of 16 bytes of Python's documentation and the next byte, (windows, 17) int64."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()[:200_000]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, CONTEXT + 1, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="extrap")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # use gloo without compiled kernels
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256), nn.ReLU(), nn.Linear(256, 256)
    )
    optimizer = Extrapolated(torch.optim.AdamW(model.parameters(), lr=3e-3), ExtrapConfig.preset(given.preset))
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": given.stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    optimizer.connect(engine)

    data, rank = make_data().to(engine.device), dist.get_rank()
    draw = torch.Generator().manual_seed(rank)

    def loss_of(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(engine(rows[:, :-1]), rows[:, -1])

    @torch.no_grad()
    def loss_at_x() -> float:
        optimizer.eval()  # y -> x; also needed before saving
        found = loss_of(data[:BATCH])
        dist.all_reduce(found)
        return found.item() / dist.get_world_size()

    first = loss_at_x()
    for _ in range(given.steps):
        rows = data[torch.randint(len(data), (BATCH,), generator=draw)]
        if optimizer.wants_probe:
            with optimizer.probing() as backward:
                backward(loss_of(rows))
        optimizer.train()  # x -> y
        engine.backward(loss_of(rows))
        engine.step()  # y -> x, then the base optimizer's step
    last = loss_at_x()
    if rank == 0:
        print(f"{type(engine).__name__}, stage {engine.zero_optimization_stage()}, {dist.get_world_size()} processes")
        print(f"loss at x, before: {first:.3f}, after {given.steps} steps: {last:.3f}")
    let_gloo_finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
