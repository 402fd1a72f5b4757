"""The models of this package; importing this module registers them with the Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

from hf_extrap.recipes.image_classification.resnet import ExtrapResNetConfig, ExtrapResNetForImageClassification
from hf_extrap.recipes.language_modeling.lstm import ExtrapLstmConfig, ExtrapLstmForCausalLM, ExtrapLstmModel

__all__ = [
    "ExtrapLstmConfig",
    "ExtrapLstmForCausalLM",
    "ExtrapLstmModel",
    "ExtrapResNetConfig",
    "ExtrapResNetForImageClassification",
]


AutoConfig.register(ExtrapLstmConfig.model_type, ExtrapLstmConfig, exist_ok=True)
AutoModel.register(ExtrapLstmConfig, ExtrapLstmModel, exist_ok=True)
AutoModelForCausalLM.register(ExtrapLstmConfig, ExtrapLstmForCausalLM, exist_ok=True)
AutoConfig.register(ExtrapResNetConfig.model_type, ExtrapResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(ExtrapResNetConfig, ExtrapResNetForImageClassification, exist_ok=True)
