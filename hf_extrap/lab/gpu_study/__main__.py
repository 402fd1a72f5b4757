"""`python3 -m hf_extrap.lab.gpu_study --minutes M --data DIR --output_dir DIR`; without `--minutes`, a report only."""

from __future__ import annotations

import argparse
from pathlib import Path

from .report import write_report
from .study import SLOTS, gpu_study
from .training import Setting


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser("gpu_study", description="Extrapolation at a batch of 8,192 on one GPU.")
    parser.add_argument("--minutes", type=float, default=None, help="wall-clock time in all; default: report only")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="folder of the parquet files")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu-study"))
    parser.add_argument("--slots", type=int, default=SLOTS[-1], help="maximum number of concurrent runs")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the images and of a worker's batch")
    parser.add_argument("--fake_gpu_minutes", type=float, default=None, help="plan as for a GPU in so many minutes")
    parser.add_argument("--epochs", type=int, default=Setting.epochs, help="of a run of the first stage")
    parser.add_argument("--rates", type=float, nargs="+", default=Setting.rates, help="peak learning rates")
    parser.add_argument("--depth", type=int, default=Setting.depth, help="of the ResNet")
    options = vars(parser.parse_args())
    setting = Setting(epochs=options.pop("epochs"), rates=tuple(options.pop("rates")), depth=options.pop("depth"))
    study = options["minutes"] is not None
    print(gpu_study(**options, setting=setting) if study else write_report(options["output_dir"]))


if __name__ == "__main__":
    main()
