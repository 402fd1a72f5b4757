"""The model card that a Trainer writes, with a section on extrapolation."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard

from hf_extrap.optim.config import ExtrapConfig


def optimizer_name(optimizer: torch.optim.Optimizer | None) -> str:
    """Class name of the base optimizer, below the wrappers of Accelerate and of this package."""
    while True:
        inner = next((getattr(optimizer, name) for name in ("optimizer", "base") if hasattr(optimizer, name)), None)
        if inner is None:
            return type(optimizer).__name__
        optimizer = inner


def add_extrapolation(path: Path, preset: str, config: ExtrapConfig, optimizer: torch.optim.Optimizer) -> None:
    """Append to a model card of the stock Trainer how gradients were extrapolated, and name the base optimizer.

    Of the card's metadata only the tags change; `optimizer` is that of the training, possibly wrapped.
    """
    card = ModelCard.load(path)
    card.data.tags = sorted({*(card.data.tags or []), "hf_extrap", f"extrap:{preset}", "arxiv:2006.05720"})
    fields = yaml.safe_dump(config.to_dict(), sort_keys=False).strip()
    card.text += (
        f"\n\n### Extrapolation\n\nGradients were taken at extrapolated points by `hf_extrap`, preset `{preset}`, and "
        f"stepped by {optimizer_name(optimizer)}. The training loss is the loss at the extrapolated point; evaluations "
        f"and weights are at the parameters themselves.\n\n```yaml\n{fields}\n```\n"
    )
    card.save(path)
