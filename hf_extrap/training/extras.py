"""Optional dependencies: an import that fails names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

#: Modules whose distributions have other names.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Context of imports of the extra `name`; ModuleNotFoundError, in one sentence, if a module is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = PACKAGES.get(str(error.name), error.name)
        install = f"pip install '.[{name}]' in the checkout, or pip install {package}"
        message = f"{error.name} is not installed; it is part of the extra {name}: {install}."
        raise ModuleNotFoundError(message, name=error.name) from error
