"""Make what several test folders share importable, and launch the scripts of this one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def launch_here(launch: Callable[..., str]) -> Callable[..., list[Any]]:
    """Runs a script of this folder as `SCRIPT FOLDER WORDS…`, and gives what each process has left in FOLDER/NAME_R.pt:
    `launch_here("script.py", folder, *words, left="name", processes=2)`."""

    def run(script: str, folder: Path, *words: str | Path, left: str, processes: int = 2) -> list[Any]:
        launch(HERE / script, folder, *words, processes=processes)
        return [torch.load(folder / f"{left}_{rank}.pt", weights_only=True) for rank in range(processes)]

    return run
