"""Extrapolation for large-batch training (Lin, Kong, Stich, Jaggi, ICML 2020) for Hugging Face and PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .auto_classes import register_models

if TYPE_CHECKING:
    from .optim.config import PRESETS as PRESETS
    from .optim.config import ExtrapConfig as ExtrapConfig
    from .optim.extrapolated import Extrapolated as Extrapolated
    from .training.arguments import ExtrapArguments as ExtrapArguments
    from .training.arguments import ExtrapSeq2SeqTrainingArguments as ExtrapSeq2SeqTrainingArguments
    from .training.arguments import ExtrapTrainingArguments as ExtrapTrainingArguments
    from .training.trainer import ExtrapSeq2SeqTrainer as ExtrapSeq2SeqTrainer
    from .training.trainer import ExtrapTrainer as ExtrapTrainer
    from .training.trainer import ExtrapTrainerMixin as ExtrapTrainerMixin

__version__ = "0.1.0"

_HOME = {
    "PRESETS": "optim.config",
    "ExtrapConfig": "optim.config",
    "Extrapolated": "optim.extrapolated",
    "ExtrapArguments": "training.arguments",
    "ExtrapTrainingArguments": "training.arguments",
    "ExtrapSeq2SeqTrainingArguments": "training.arguments",
    "ExtrapTrainer": "training.trainer",
    "ExtrapSeq2SeqTrainer": "training.trainer",
    "ExtrapTrainerMixin": "training.trainer",
}

__all__ = ["__version__", *_HOME]

register_models()


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that `import hf_extrap` does not import torch."""
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
