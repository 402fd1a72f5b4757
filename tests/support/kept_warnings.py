"""The warnings of the package, for tests of what it says and of what it keeps to itself."""

from __future__ import annotations

import logging


class Warnings(logging.Handler):
    """Keeps their texts, from when it is made."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("hf_extrap").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
