"""Whether a model's loss uses `num_items_in_batch`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def uses_num_items(model: nn.Module, loss: Callable[..., Any], inputs: dict[str, Any]) -> bool:
    """Whether the Trainer's `compute_loss` of a micro-batch depends on `num_items_in_batch`, by two passes.

    The Trainer takes a model that accepts `**kwargs` for one that uses it. If the model ignores it, gradients are too
    large by the number of accumulation steps times that of processes.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            one, two = (float(loss(model, dict(inputs), False, torch.tensor(n))) for n in (1000.0, 2000.0))
    finally:
        model.train(was_training)
    if one == 0 or not math.isclose(one, two, rel_tol=1e-3):
        return True
    message = "%s takes num_items_in_batch and ignores it: micro-batches and processes are averaged instead"
    logger.warning(message, type(model).__name__)
    return False
