"""Records the warnings of the package, for tests of what is and is not warned of."""

from __future__ import annotations

import logging


class Warnings(logging.Handler):
    """Keeps the text of every warning since it was created."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("hf_extrap").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
