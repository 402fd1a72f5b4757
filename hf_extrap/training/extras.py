"""Optional dependencies: an import that fails names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

#: Modules whose distributions have other names.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Context of imports that the extra `name` of this package installs.

    Raises:
        ModuleNotFoundError: in one sentence, if a module is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = PACKAGES.get(str(error.name), error.name)
        install = f"pip install '.[{name}]' in the checkout, or pip install {package}"
        message = f"{error.name} is not installed; it is part of the extra {name}: {install}."
        raise ModuleNotFoundError(message, name=error.name) from error


def require(name: str, module: str) -> None:
    """Check, without importing it, that a module of the extra `name` is installed.

    Raises:
        ModuleNotFoundError: in one sentence, if it is not.
    """
    with extra(name):
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)
