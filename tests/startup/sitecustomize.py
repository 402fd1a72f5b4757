"""Run by every Python that a test starts: a quarter of what imports take is looking for garbage that is not there."""

import gc

gc.set_threshold(100_000, 50, 100)
