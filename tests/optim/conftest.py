"""Make `plain_loop`, which three test folders share, importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))
