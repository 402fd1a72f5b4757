"""An optimizer around another one, which shows the other one's face."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """Groups, state and defaults are the base optimizer's own, to read and to replace.

    Attributes:
        base: the optimizer inside. A class that inherits sets it, and then calls `Optimizer.__setstate__(self, {})` for
            the hooks of a torch optimizer; `Optimizer.__init__` would make groups of its own.
    """

    base: Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's own state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's own defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base.add_param_group(param_group)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
