"""Imports of heavy libraries, at the speed and with the output that a command line needs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Pause the garbage collector for the imports inside, and exempt the imported objects from later collections.

    Does nothing if torch is imported already: the objects of a running program are its own.
    """
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
