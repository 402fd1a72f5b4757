"""`python3 -m hf_extrap.lab.gpu_study --minutes M --data FOLDER --output_dir DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .study import SLOTS, gpu_study
from .training import Setting


def main() -> None:
    """Read the command line, run the study, print its tables."""
    parser = argparse.ArgumentParser("gpu_study", description="Extrapolation at a batch of 8,192 on one GPU.")
    parser.add_argument("--minutes", type=float, required=True, help="of wall-clock time, everything included")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu-study"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--slots", type=int, default=SLOTS[-1], help="concurrent runs, at most")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the images and of a worker's batch")
    parser.add_argument("--fake_gpu_minutes", type=float, default=None, help="plan as for a GPU with so many minutes")
    parser.add_argument("--epochs", type=int, default=Setting.epochs, help="of a run of the first stage")
    parser.add_argument("--depth", type=int, default=Setting.depth, help="of the ResNet")
    parser.add_argument("--no_graphs", action="store_true", help="launch every pass kernel by kernel")
    known = parser.parse_args()
    setting = Setting(epochs=known.epochs, depth=known.depth)
    print(
        gpu_study(
            known.data,
            known.output_dir,
            known.minutes,
            device=torch.device(known.device),
            fraction=known.fraction,
            fake_gpu_minutes=known.fake_gpu_minutes,
            slots=known.slots,
            graphs=not known.no_graphs,
            setting=setting,
        )
    )


if __name__ == "__main__":
    main()
