"""An optimizer that wraps another one and shares its groups, state and defaults."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """Reads and replaces the base optimizer's own groups, state and defaults.

    Hooks that are registered here are called once: those of `step`, of `state_dict` and of `load_state_dict` around the
    whole call. Hooks of the base optimizer, and torch's for all optimizers, are called around the base's own step.

    Attributes:
        base: the wrapped optimizer. A subclass sets it, and then calls `_initialize`.
    """

    base: Optimizer

    def __init_subclass__(cls) -> None:
        if "step" in vars(cls):
            setattr(cls, "step", _with_hooks(vars(cls)["step"]))  # noqa: B010, mypy takes no method for a variable

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

    def state_dict(self) -> dict[str, Any]:
        """The state to be saved; tensors are not copied."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self._whole_state()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or the base optimizer's state alone.

        Raises:
            ValueError: for a state of another model or a malformed one, before anything is loaded.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load_whole_state(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _whole_state(self) -> dict[str, Any]:
        return self.base.state_dict()

    def _load_whole_state(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)

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


def _with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step between the optimizer's own hooks; torch's decorator would call those for all optimizers a second time."""

    @wraps(step)
    def call(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        words: tuple[Any, ...] = (self, *args)
        for before in self._optimizer_step_pre_hooks.values():
            changed = before(self, words, kwargs)
            words, kwargs = (words, kwargs) if changed is None else changed
        result = step(*words, **kwargs)
        for after in self._optimizer_step_post_hooks.values():
            after(self, words, kwargs)
        return result

    call.hooked = True  # type: ignore[attr-defined]
    return call
