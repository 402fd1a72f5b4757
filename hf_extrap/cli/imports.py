"""Imports of heavy libraries, at the speed and with the output that a command line needs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Variables with which libraries are told, before their import, to show no progress bars.
NO_BARS = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")


@contextmanager
def importing() -> Iterator[None]:
    """Pause the garbage collector for the imports inside, and exempt the imported objects from later collections.

    Where stderr is no terminal, progress bars are off. The garbage collector is left alone if torch is imported
    already: the objects of a running program are its own.
    """
    if not sys.stderr.isatty():
        for name in NO_BARS:
            os.environ.setdefault(name, "1")
    if not gc.isenabled() or "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def hide_loading_bars() -> None:
    """Hide the progress bars of reading and writing files; those of training and evaluation stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
