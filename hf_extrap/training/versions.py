"""Versions of Python and of the libraries that determine a run's numbers."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "hf_extrap")


def versions() -> dict[str, str]:
    """The version of Python and of each package, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
