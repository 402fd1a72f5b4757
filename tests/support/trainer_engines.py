"""The fields with which the Trainer runs an engine on the CPU, and all parameters of a trainer that has one."""

from __future__ import annotations

from tests.support import cpu_deepspeed  # noqa: F401

# isort: split
from typing import Any, cast

import deepspeed
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from tests.support.fsdp_on_cpu import force_fsdp


def zero(engine: str) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True},
    }


def fsdp() -> dict[str, Any]:
    force_fsdp()
    wrapped = {"transformer_layer_cls_to_wrap": ["GPT2Block"], "state_dict_type": "FULL_STATE_DICT"}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2, **wrapped}}


def whole(trainer: Trainer) -> Tensor:
    """All parameters as one vector, in every process."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a pass without backward the root keeps its parameters gathered.
            module.reshard()
    params = list(model.parameters())
    if isinstance(params[0], DTensor):
        return torch.cat([cast(DTensor, p).detach().full_tensor().flatten() for p in params])
    with deepspeed.zero.GatheredParameters(params):
        return torch.cat([p.detach().flatten() for p in params])
