"""The model card that a Trainer writes, with the extrapolation and the curves of the training."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_extrap.optim.config import ExtrapConfig

from .markdown import escaped

PAPER_TAG = "arxiv:2006.05720"
CITATION = """@inproceedings{lin2020extrapolation,
  title     = {Extrapolation for Large-batch Training in Deep Learning},
  author    = {Lin, Tao and Kong, Lingjing and Stich, Sebastian U. and Jaggi, Martin},
  booktitle = {International Conference on Machine Learning},
  year      = {2020},
  eprint    = {2006.05720},
  archivePrefix = {arXiv}
}"""
DIRECTIONS = {
    "gradient": "a fresh gradient at x",
    "past_gradient": "the gradient of the last step",
    "past_update": "the last update of x",
    "gaussian": "Gaussian noise",
    "uniform": "uniform noise",
}
#: The sentence of the stock card for a model without a name.
NAMELESS = "This model is a fine-tuned version of [](https://huggingface.co/) on"


def optimizer_name(optimizer: torch.optim.Optimizer | None) -> str:
    """Class name of the base optimizer, below the wrappers of Accelerate and of this package."""
    while True:
        inner = next((getattr(optimizer, name) for name in ("optimizer", "base") if hasattr(optimizer, name)), None)
        if inner is None:
            return type(optimizer).__name__
        optimizer = inner


def is_hub_name(name: Any) -> bool:
    """Whether a text can be the name of a model or dataset on the Hub, and is not that of a local file or folder."""
    if not isinstance(name, str) or not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def tags(preset: str) -> list[str]:
    """Tags of a model that was trained with this preset."""
    return ["hf_extrap", "large-batch-training", "extragradient", f"extrap:{preset}", PAPER_TAG]


def method(config: ExtrapConfig, optimizer: str) -> str:
    """Two sentences on how a model was trained."""
    if config.direction == "none":
        return f"The parameters x were trained by {optimizer}. Gradients were not extrapolated."
    point = f"y = x {'+' if config.ascent else '−'} η · S(d, x)"
    who = "Every worker took its gradient at its own" if config.is_local else "All workers took their gradients at one"
    return (
        f"{who} extrapolated point {point}, where d is {DIRECTIONS[config.direction]}, and {optimizer} stepped the "
        "parameters x by the averaged gradient. The parameters held x between steps: the saved weights and all "
        "evaluations are at x, the training loss is the loss at y."
    )


def changed_fields(config: ExtrapConfig) -> str:
    """The fields of a scheme that differ from the defaults, as YAML; empty if none does."""
    defaults = ExtrapConfig().to_dict()
    fields = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    return yaml.safe_dump(fields, sort_keys=False).strip() if fields else ""


def complete_card(
    path: Path, preset: str, config: ExtrapConfig, optimizer: torch.optim.Optimizer | None, figure: str | None
) -> None:
    """Complete the card that a stock Trainer has written: its title is escaped, and the extrapolation is described.

    `optimizer` is that of the training, possibly wrapped, and `figure` the name of a file beside the card. Before the
    training, and without extrapolation, only the title and the sentence on the base model change.
    """
    card = ModelCard.load(path)
    if card.data.base_model is not None and not is_hub_name(card.data.base_model):
        card.data.base_model = None
    text = card.text.replace(NAMELESS, "This model was trained from scratch on")
    text = re.sub(r"^# (.*)$", lambda title: f"# {escaped(title[1])}", text, count=1, flags=re.MULTILINE)
    if config.direction != "none" and optimizer is not None:
        card.data.tags = sorted({*(card.data.tags or []), *tags(preset)})
        whole = f"<details>\n<summary>All fields</summary>\n\n```yaml\n{config.to_yaml().strip()}\n```\n\n</details>"
        parts = [
            "### Extrapolation",
            f"Trained with `hf_extrap`, preset `{preset}`. {method(config, optimizer_name(optimizer))}",
            f"```yaml\n{changed_fields(config)}\n```\n\n{whole}",
            *([f"![Training curves]({figure})"] if figure else []),
            f"```bibtex\n{CITATION}\n```",
        ]
        text += "\n\n" + "\n\n".join(parts) + "\n"
    card.text = text
    card.save(path)
