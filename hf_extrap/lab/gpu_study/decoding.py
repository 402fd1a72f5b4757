"""JPEG images to arrays in several processes; it imports no torch, so that the processes start fast."""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

FEW = 2000
"""Images that one process decodes sooner than others start."""


def decode(encoded: Sequence[bytes]) -> np.ndarray:
    """Images of one size, encoded, to uint8 (N, height, width, 3)."""
    if len(encoded) <= FEW:
        return _decode(encoded)
    processes = min(16, os.cpu_count() or 1)
    size = -(-len(encoded) // processes)
    parts = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return np.concatenate(list(pool.map(_decode, parts)))


def _decode(encoded: Sequence[bytes]) -> np.ndarray:
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])
