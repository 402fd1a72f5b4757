"""What a Trainer logged, for comparisons of two runs."""

from __future__ import annotations

from typing import Any

from transformers import Trainer


def history(trainer: Trainer) -> list[dict[str, Any]]:
    """Every logged row, without times."""
    times = ("_runtime", "_per_second")
    return [{key: row[key] for key in row if not key.endswith(times)} for row in trainer.state.log_history]
