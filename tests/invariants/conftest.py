"""Make `plain_loop` and `processes`, which several test folders share, importable."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "optim"), str(Path(__file__).parents[1] / "distributed")]
