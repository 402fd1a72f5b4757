"""Learning rates for large batches: scaling rules, and step decay behind a warm-up."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence


def scaled_learning_rate_factor(rule: str, batch_size: float, base_batch_size: float) -> float:
    """What to multiply a learning rate by that was tuned at another batch size.

    Args:
        rule: `none`, 1; `linear`, the ratio of the batch sizes (Goyal et al. 2017); `sqrt`, its square root, for
            adaptive optimizers (Hoffer et al. 2017).
        batch_size: of one step over all workers, in any unit.
        base_batch_size: the one that the learning rate was tuned at, in the same unit.
    """
    ratio = batch_size / base_batch_size if rule != "none" else 1.0
    return math.sqrt(ratio) if rule == "sqrt" else ratio


def step_decay(
    total_steps: int, warmup_steps: int, milestones: Sequence[float], factor: float
) -> Callable[[int], float]:
    """A schedule for `LambdaLR`: linear warm-up to 1, then times `factor` at each milestone.

    Args:
        total_steps: steps of the training.
        warmup_steps: steps from 0 to the full learning rate.
        milestones: increasing shares of the training, in (0, 1).
        factor: of one milestone.
    """
    steps = [math.ceil(share * total_steps) for share in milestones]

    def rate(step: int) -> float:
        warm = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return warm * factor ** bisect_right(steps, step)

    return rate
