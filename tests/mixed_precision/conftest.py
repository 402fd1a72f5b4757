"""Make `measuring`, `tiny_trainer` and `plain_loop` importable."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("mixed_precision", "training", "optim")]
