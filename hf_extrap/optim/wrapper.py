"""An optimizer that wraps another one and shares its groups, state and defaults."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """Reads and replaces the base optimizer's own groups, state and defaults.

    Attributes:
        base: the wrapped optimizer. A subclass sets it, and then calls `_initialize`.
    """

    base: Optimizer

    def _initialize(self) -> None:
        """Set up the hooks of a torch optimizer; `Optimizer.__init__` would make other groups."""
        defaults = set(self.base.defaults)
        Optimizer.__setstate__(self, {})
        for name in set(self.base.defaults) - defaults:
            # torch adds `differentiable`, which would enter groups that are added later.
            del self.base.defaults[name]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, unless a check of the parameters refuses it."""
        self.base.add_param_group(param_group)
        try:
            self._check_params()
        except ValueError:
            self.param_groups.pop()
            raise

    def train_base(self) -> None:
        """Put a base optimizer that has modes, such as a schedule-free one, into its training mode."""
        if hasattr(self.base, "train"):
            self.base.train()

    def _check_params(self) -> None:
        """Raise a ValueError for parameters that cannot be optimized."""

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"
