"""Run by torchrun as `… FOLDER STAGE`: float16 under DeepSpeed in two processes, which its CPU accelerator refuses.

A process leaves fp16_STAGE_R.pt: the final weights of each cell, and the steps taken and skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.support import cpu_deepspeed  # noqa: F401

# isort: split
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.leaving import save_and_leave

STEPS = 12
GLOBAL = ["none", "extragradient", "optimistic", "past-update"]
PRESETS = {1: [*GLOBAL, "extrap", "extrap-past"], 3: GLOBAL}
FITS, OVERFLOWS = 8, 24
"""Initial loss scales, as powers of two; from the second, steps are skipped until it has been halved often enough."""


def config_of(preset: str) -> ExtrapConfig:
    # In units of the gradient, where a loss scale that leaks in would show.
    return ExtrapConfig.preset(preset, **({"step_ratio": 0.5} if preset in ("extrap", "extrap-past") else {}))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def batch(step: int, worker: int) -> tuple[Tensor, Tensor]:
    """Inputs (7, 5) and labels (7,)."""
    generator = torch.Generator().manual_seed(100 * step + worker)
    return torch.randn(7, 5, generator=generator), torch.randint(3, (7,), generator=generator)


def base(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True)


def train(preset: str, stage: int, power: int) -> tuple[Tensor, int, int]:
    """The final weights, and the steps taken and skipped."""
    model = make_model()
    optimizer = Extrapolated(base(model), config_of(preset))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 7,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
        "fp16": {"enabled": True, "initial_scale_power": power, "hysteresis": 1},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    optimizer.connect(engine)
    for step in range(STEPS):
        inputs, labels = batch(step, dist.get_rank())
        if optimizer.wants_probe:
            with optimizer.probing() as backward:
                backward(nn.functional.cross_entropy(engine(inputs.half()).float(), labels))
        optimizer.train()
        engine.backward(nn.functional.cross_entropy(engine(inputs.half()).float(), labels))
        engine.step()
    params = list(model.parameters())
    with deepspeed.zero.GatheredParameters(params):
        weights = torch.cat([p.detach().float().flatten() for p in params])
    assert all(p.dtype == torch.float16 for p in params)
    return weights, optimizer.step_count, optimizer.skipped_steps


def main(folder: Path, stage: int) -> None:
    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    seen = {(preset, power): train(preset, stage, power) for preset in PRESETS[stage] for power in (FITS, OVERFLOWS)}
    save_and_leave({f"{preset} {power}": value for (preset, power), value in seen.items()}, folder, f"fp16_{stage}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
