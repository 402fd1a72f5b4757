"""Steps to a training loss of 0.05 where stability limits training: digits, full batches, momentum, seven workers.

All methods have the same learning rates and seeds; each is reported at its best rate.
Run: python examples/full_batch.py
"""

from __future__ import annotations

import argparse
import statistics

import torch
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

from hf_extrap import ExtrapConfig, Extrapolated

WORKERS, TARGET, STEPS = 7, 0.05, 160
METHODS = {
    "none": {},
    "extrap-past": {},
    "extrap-past, a fifth of the step": {"scaling": "step", "step_size": 0.2},
    "extrap-past, half of the step": {"scaling": "step", "step_size": 0.5},
    "optimistic, half of the step": {"scaling": "step", "step_size": 0.5},
    "extrap-past, auto": {"step_size": "auto"},
    "extrap-past, auto, at most half": {"step_size": "auto", "max_displacement": 0.5},
    "past-update": {},
    "extrap": {},
    "extrap, a fifth of the step": {"scaling": "step", "step_size": 0.2},
    "extrap, auto": {"step_size": "auto"},
    "sam": {},
}


def steps_to_target(method: str, rate: float, seed: int, nesterov: bool) -> tuple[int, float]:
    """Steps until the loss of all samples is below the target, STEPS + 1 if it never is, and gradients per worker."""
    images, labels = (torch.tensor(array)[:1400] for array in load_digits(return_X_y=True))
    images = images.float() / 16
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    config = ExtrapConfig.preset(method.split(",")[0], **METHODS[method])
    base = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=nesterov)
    optimizer = Extrapolated(base, config, virtual_workers=WORKERS)
    loss, gradients = nn.CrossEntropyLoss(), 0
    for _ in range(STEPS):
        for worker, rows in enumerate(torch.randperm(len(images)).chunk(WORKERS)):
            if optimizer.wants_probe:
                with optimizer.probing(worker=worker):
                    (loss(model(images[rows]), labels[rows]) / WORKERS).backward()
                gradients += 1
            optimizer.train(worker=worker)
            (loss(model(images[rows]), labels[rows]) / WORKERS).backward()
            gradients += 1
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            reached = float(loss(model(images), labels)) < TARGET
        if reached:
            break
    return optimizer.step_count if reached else STEPS + 1, gradients / WORKERS


def main() -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.15, 0.23, 0.34, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--heavy_ball", action="store_true", help="momentum without Nesterov's correction")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'method':<34}{'steps':>6}{'gradients':>11}  rate  steps of each seed")
    for method in arguments.methods:
        found = {
            rate: [steps_to_target(method, rate, seed, not arguments.heavy_ball) for seed in arguments.seeds]
            for rate in tqdm(arguments.rates, desc=method, leave=False)
        }
        best = min(found, key=lambda rate: statistics.mean(steps for steps, _ in found[rate]))
        steps, gradients = (statistics.mean(values) for values in zip(*found[best], strict=True))
        each = ", ".join(str(count) for count, _ in found[best])
        print(f"{method:<34}{steps:>6.1f}{gradients:>11.1f}  {best:<5g} {each}")


if __name__ == "__main__":
    main()
