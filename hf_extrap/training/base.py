"""What the parts of the mixin share: where the wrapper is, and the types of what the Trainer brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from hf_extrap.optim.extrapolated import Extrapolated

from .arguments import ExtrapTrainingArguments
from .carried_state import CarriedState

if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


class MixinBase(TrainerBase):
    """A part of `ExtrapTrainerMixin`, which stands before a Trainer among the bases of a class."""

    args: ExtrapTrainingArguments
    model: nn.Module
    _carried: CarriedState
    _client_optimizer: Extrapolated | None = None
    _connected_to: nn.Module | None = None

    @property
    def extrapolated(self) -> Extrapolated | None:
        """The wrapper, wherever accelerate has put it; None before `create_optimizer`."""
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, Extrapolated):
            return optimizer
        # DeepSpeed has an optimizer of its own in that place, and calls ours.
        return self._client_optimizer if self.is_deepspeed_enabled else None

    @property
    def _has_engine(self) -> bool:
        """Whether DeepSpeed or FSDP holds the parameters."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _connect(self, model: nn.Module) -> None:
        """Let the wrapper meet its engine, once, before its state is loaded."""
        if self.is_deepspeed_enabled and not hasattr(model, "zero_optimization_stage"):
            raise ValueError(
                f"deepspeed is given, but the model is a {type(model).__name__}: accelerate has fallen back to another "
                "engine; allowed on the CPU: DS_ACCELERATOR=cpu, without ACCELERATE_USE_CPU."
            )
        if self._has_engine and self._connected_to is not model and (optimizer := self.extrapolated) is not None:
            optimizer.connect(model)
            self._connected_to = model

    def _pass_back(self, loss: Tensor, backward: Callable[[Tensor], None]) -> None:
        """A loss inside `probing`, which gave `backward`."""
        if self.is_deepspeed_enabled:
            # It divides by the accumulation steps of its configuration.
            backward(loss * self.args.gradient_accumulation_steps)
        else:
            self.accelerator.backward(loss)


def refuse(field: str, obstacles: Mapping[str, bool], allowed: str) -> None:
    """Raise a ValueError that names the first obstacle that stands.

    Args:
        field: the field that cannot be as it is, with its value: `local_steps is 8`.
        obstacles: each in words, and whether it stands.
        allowed: what is, and what to give instead.
    """
    for obstacle, stands in obstacles.items():
        if stands:
            raise ValueError(f"{field} and {obstacle}; allowed: {allowed}.")
