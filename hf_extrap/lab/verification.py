"""What the manifest of a checkpoint costs: `python -m hf_extrap.lab.verification [--parameters N]`."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tabulate import tabulate

from hf_extrap.training.checkpoints.manifest import find_damage, write_manifest


def main() -> None:
    """Print the times of saving, verifying and loading a model with Adam's state, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=124_000_000, help="of the model, in tensors of a million")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = {f"weight_{i}": torch.randn(1_000_000) for i in range(options.parameters // 1_000_000)}
    adam = {name: {"exp_avg": torch.randn_like(w), "exp_avg_sq": torch.rand_like(w)} for name, w in weights.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint-1"
        folder.mkdir()

        def save() -> None:
            save_file(weights, folder / "model.safetensors")
            torch.save(adam, folder / "optimizer.pt")

        def load() -> None:
            load_file(folder / "model.safetensors")
            torch.load(folder / "optimizer.pt", weights_only=True)

        def verify() -> None:
            if damage := find_damage(folder):
                raise RuntimeError(str(damage))

        work: dict[str, Callable[[], Any]] = {
            "save": save,
            "manifest and fsync": lambda: write_manifest(folder, {"step": 1}),
            "verify": verify,
            "load": load,
        }
        # In the order of a run, round by round, all from the page cache.
        times: dict[str, list[float]] = {step: [] for step in work}
        for _ in range(options.rounds):
            for step, function in work.items():
                began = time.perf_counter()
                function()
                times[step].append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in folder.iterdir())
    found = {step: median(values) for step, values in times.items()}
    rows = [(step, f"{seconds:.3f}", f"{size / seconds / 1e9:.1f}") for step, seconds in found.items()]
    print(tabulate(rows, headers=["", "seconds", "GB/s"], tablefmt="github"))
    print(f"{size / 1e9:.2f} GB, median of {options.rounds}; verify / load {found['verify'] / found['load']:.2f}")


if __name__ == "__main__":
    main()
