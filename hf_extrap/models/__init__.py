"""Models of this package, made known to the Auto classes by importing it."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_extrap.models.lstm import ExtrapLstmConfig, ExtrapLstmForCausalLM, ExtrapLstmModel

__all__ = ["ExtrapLstmConfig", "ExtrapLstmForCausalLM", "ExtrapLstmModel", "register"]


def register() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and pipelines know the models; may be called again."""
    AutoConfig.register(ExtrapLstmConfig.model_type, ExtrapLstmConfig, exist_ok=True)
    AutoModel.register(ExtrapLstmConfig, ExtrapLstmModel, exist_ok=True)
    AutoModelForCausalLM.register(ExtrapLstmConfig, ExtrapLstmForCausalLM, exist_ok=True)


register()
