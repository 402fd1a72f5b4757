"""Extrapolated: takes gradients at an extrapolated point, around any base optimizer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import state
from .buffers import Buffers
from .config import ExtrapConfig
from .displacement import ABANDONED
from .engines import Engine, check_arguments, check_known, check_params, check_scheme, engine_of
from .foreach import is_finite
from .loss_scale import LossScale
from .probing import fresh_gradient, scaled
from .scheme import Scheme
from .step_in_progress import StepInProgress, observe
from .step_statistics import StepStatistics
from .wrapper import OptimizerWrapper

logger = logging.getLogger(__name__)


class Extrapolated(OptimizerWrapper):
    """Takes the gradient at an extrapolated point y = x − η · S(d, x), and steps the parameters x with any optimizer.

    Between steps the parameters hold x. A training loop gains one line, and two where a step needs a gradient at x:

        if optimizer.wants_probe:
            with optimizer.probing() as backward:
                backward(loss(batch))       # at x; leaves .grad and the random state as they were
        optimizer.train()                   # x → y
        loss(batch).backward()
        optimizer.step()                    # y → x, then the base optimizer's step

    Under DeepSpeed and FSDP2 call `connect` once with the prepared model.

    With K virtual workers, K accumulation micro-batches each act as a worker with its own y and d: `probing(worker=k)`
    and `train(worker=k)`, all of one worker before those of the next, with the loss divided by K. In global scope one
    `probing()` holds all K backward passes.

    Args:
        base: the optimizer that steps x. Its groups, state, defaults and state dict are this one's.
        config: the scheme.
        virtual_workers: workers that this process plays, one after another.
        grad_scaler: the `torch.amp.GradScaler` in use, if any, whose scale is taken out of the directions.

    Attributes:
        loss_scale: factor of a worker's mean loss before backward, 1 / virtual_workers unless set.
        step_count: steps taken.
        skipped_steps: steps skipped for an overflow or a gradient that is not finite.
        collect_statistics: whether the next step fills `statistics`.
        statistics: of the last step that collected any: `displacement_norm`, `step_length` (of x), `step_size`,
            `direction_cosine` (of the local direction with the averaged gradient), `gradient_square` (‖ḡ‖²),
            `pass_square` (mean of ‖g‖² over this process's passes, each in the units of the mean loss), `passes`.
        engine: holds the parameters.
        scheme: direction, step size, scaling and displacement.

    Raises:
        TypeError: if `base` is not a torch optimizer.
        ValueError: for local scope over sharded parameters, parameters that cannot be moved, or `virtual_workers` < 1.

    Source: Lin, Kong, Stich, Jaggi, "Extrapolation for Large-batch Training in Deep Learning", ICML 2020.
    """

    def __init__(
        self,
        base: Optimizer,
        config: ExtrapConfig,
        *,
        virtual_workers: int = 1,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        check_arguments(base, config, virtual_workers)
        self.base = base
        self.config = config
        self.virtual_workers = virtual_workers
        self.grad_scaler = grad_scaler
        self.loss_scale = 1 / virtual_workers
        self.step_count = 0
        self.skipped_steps = 0
        self.collect_statistics = False
        self.statistics: dict[str, float] = {}
        self._assemble(Engine(base))
        self._given = [weakref.ref(p) for p in self._params()]
        self._initialize()

    def _assemble(self, engine: Engine) -> None:
        """Make the parts for an engine."""
        check_scheme(self.config, engine, self.base)
        self.engine = engine
        self.scheme = Scheme(self.config, engine, self.base)
        self._scale = LossScale(engine, self.grad_scaler)
        self._step = StepInProgress()

    def connect(self, model: torch.nn.Module) -> None:
        """Set the engine that holds the parameters, before training and before a state is loaded.

        Args:
            model: what `deepspeed.initialize` returned, with this optimizer as its client optimizer, or a module after
                `fully_shard`; any other module changes nothing.

        Raises:
            ValueError: for a scheme that the engine cannot carry out.
            RuntimeError: if it is called in the middle of a step.
        """
        if self.scheme.hooks.seen or self.scheme.displacement.worker is not None:
            raise RuntimeError("connect was called in the middle of a step; allowed: between two steps.")
        self._assemble(engine_of(model, self.base))
        self._given = []
        self.engine.follow(self._before_engine_step, self._after_engine_step)
        # Some engines take a step without gradients when they start.
        self.step_count = self.skipped_steps = 0

    # Before the gradient at y

    @property
    def wants_probe(self) -> bool:
        """Whether a gradient at x, inside `probing`, must come before the next `train`."""
        self._notice_abandoned_step()
        if self._step.is_probed or not self.scheme.needs_probe(self.step_count):
            return False
        return len(self._step.probed) < (self.virtual_workers if self.config.is_local else 1)

    @contextmanager
    def probing(
        self, worker: int | None = None, model: torch.nn.Module | None = None
    ) -> Iterator[Callable[[Tensor], None]]:
        """Backward passes inside give the worker's fresh direction, at x.

        `.grad` stays as it is, and so does the random state, so that the pass at y has the same dropout masks; with
        `batch: independent` the masks are independent too.

        Args:
            worker: the virtual worker; global scope has one direction for all.
            model: the module that is passed. Its BatchNorm layers count the batch at y alone, and in local scope
                DistributedDataParallel does not average this gradient.

        Yields:
            The function that starts a backward pass from a loss: `loss.backward()`, or DeepSpeed's equivalent.
        """
        key = self._select(worker)
        check_known(self.engine, self._given)
        self._restore(keep=self.scheme.displacement.worker == key)
        self._base_trains()
        same_masks = self.config.batch != "independent"
        with fresh_gradient(self.scheme, self.engine, key, self._unscale, model, same_masks) as backward:
            yield backward
        self.note_probe(key)

    @torch.no_grad()
    def train(self, worker: int | None = None) -> None:
        """Move the parameters from x to the worker's y, before its forward pass; a second call changes nothing.

        Raises:
            RuntimeError: if the step needs a fresh direction and no `probing` came before.
            ValueError: for a worker outside range(virtual_workers).
        """
        self._train(worker)

    def _train(self, worker: int | None, keep_direction: bool = False) -> None:
        self._notice_abandoned_step()
        key, scheme, step = self._select(worker), self.scheme, self.step_count
        self._step.is_probed = self._step.is_observed = False
        if scheme.displacement.worker is None:
            self._base_trains()
        if self.config.direction == "none" and not self.collect_statistics:
            return
        check_known(self.engine, self._given)
        scheme.hooks.start_pass(self.engine.leaves(), self.collect_statistics)
        scheme.step_size.follow([options for options, _ in self.engine.groups()])
        self._scale.note()
        if self.config.is_active(step) and scheme.displacement.worker != key:
            if scheme.needs_probe(step) and key not in self._step.probed:
                raise RuntimeError(
                    f"direction {self.config.direction!r} needs a gradient at x first: "
                    "`if optimizer.wants_probe: with optimizer.probing(): loss.backward()` before optimizer.train()."
                )
            scheme.extrapolate(key, step, self._noted, keep_direction)
        # After the move, which frees memory. An engine that clips by itself reports by how much.
        if scheme.needs_local_gradients(step) or (scheme.measures_curvature(step) and not self.engine.steps_inside):
            scheme.local_gradients.receive(key, len(self.engine.params()), self._unscale)

    @contextmanager
    def extrapolating(self, worker: int | None = None) -> Iterator[None]:
        """Between two steps: inside, the parameters hold the y of the worker's next step, and afterwards x again.

        The next step is not affected. A fresh direction comes from `probing` before.
        """
        collect, self.collect_statistics = self.collect_statistics, False
        try:
            with torch.no_grad():
                self._train(worker, keep_direction=True)
            yield
        finally:
            self._restore()
            self.reset_step()
            self.collect_statistics = collect

    # The step

    def restore(self) -> None:
        """Put x back. Within the step, `train` moves to the same y again; gradients until then are not the step's."""
        self._restore(keep=True)

    def _restore(self, keep: bool = False) -> None:
        self.scheme.hooks.stop()
        displacement = self.scheme.displacement
        displacement.restore(keep and displacement.worker != ABANDONED)

    def eval(self) -> None:
        """Put x back, and put a base optimizer that has modes into its evaluation mode."""
        self.restore()
        if hasattr(self.base, "eval"):
            self.base.eval()

    @torch.no_grad()
    def observe(self) -> None:
        """Observe the averaged gradient after a step's last backward pass and before it is clipped, for statistics.

        Without this call `step` observes what it finds.
        """
        self._observe(scaled(self.engine.gradients(), 1 / self._scale.current()), clipped=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Restore x, then let the base optimizer step with the gradients.

        A gradient that is not finite leaves x and the base optimizer's state as they are, and drops past directions
        (`check_finite`).

        Args:
            closure: for loops that are written with one; it is evaluated at y, and at x before where the step probes.

        Returns:
            The closure's loss, or None.
        """
        if self.engine.steps_inside:
            return self._step_part()
        if self.config.direction == "none" and not (self.collect_statistics or self.scheme.hooks.seen):
            self._base_trains()
            self.step_count += 1
            return self.base.step(closure)
        loss = self._evaluate(closure) if closure is not None else None
        self._restore()
        gradients = self.engine.gradients()
        if self.config.moves and self.config.check_finite and not is_finite(gradients):
            self.discard()
            return loss
        self._base_trains()
        self._observe(gradients, clipped=True)
        self.scheme.before_step(self.step_count, self.collect_statistics)
        # Some optimizers, such as LARS, turn .grad into their update.
        self.scheme.direction.keep_averaged_gradient(self.step_count, gradients)
        self.base.step()
        self._end_step([g is not None for g in gradients])
        return loss

    def _end_step(self, stepped: Sequence[bool]) -> None:
        self.scheme.after_step(self.step_count, stepped, self._step.probed, self._noted)
        self.step_count += 1
        self.reset_step()

    # The step of an engine that calls the base optimizer itself

    def _before_engine_step(self, ends: bool) -> None:
        self._restore(keep=not ends)
        if ends and self.engine.steps_inside:
            self.scheme.before_step(self.step_count, self.collect_statistics)
        elif ends and self.collect_statistics:
            self.observe()

    def _step_part(self) -> None:
        """The base optimizer's step with the groups that the engine has put into it."""
        step, scheme = self.step_count, self.scheme
        averaged = scheme.direction.keeps_averaged_gradient(step) or self.collect_statistics
        if averaged or (scheme.measures_curvature(step) and not scheme.direction.local):
            self.engine.collect(self._params())
        self._base_trains()
        self.base.step()

    @torch.no_grad()
    def _after_engine_step(self, taken: bool) -> None:
        """The engine has written x of the next step, or has skipped the step."""
        if not taken:
            self.discard()
            return
        gradients = self.engine.gradients()
        self._observe(gradients, clipped=True)
        self.scheme.direction.keep_averaged_gradient(self.step_count, gradients)
        self._end_step([p.requires_grad for p in self.engine.leaves()])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; within a step it has no direction yet."""
        params = param_group["params"]
        check_params([params] if isinstance(params, Tensor) else list(params), self.config, len(self._params()))
        super().add_param_group(param_group)

    # A step that is not taken

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; the step is skipped if it has some that were not stepped with (see `discard`)."""
        if self.scheme.hooks.seen and not self.scheme.hooks.is_aside:
            self.discard()
        self.base.zero_grad(set_to_none)

    def discard(self) -> None:
        """Skip the step in progress: x is restored, past directions are dropped, and `skipped_steps` counts it."""
        self.skipped_steps += 1
        logger.warning(
            "step %d was skipped (overflow, or a gradient that is not finite); %d skipped so far",
            self.step_count,
            self.skipped_steps,
        )
        self.scheme.direction.drop_all()
        self.reset_step()

    def reset_step(self) -> None:
        """Forget what the step in progress has gathered (fresh directions, local gradients), and nothing else."""
        if self.collect_statistics:
            self.statistics = self._step.statistics.summary()
        self.scheme.forget_step()
        self._scale.forget()
        self._step = StepInProgress()
        if self.scheme.displacement.worker is not None:
            # Parameters must not change between a forward and its backward pass: the next train() moves them.
            self.scheme.displacement.worker = ABANDONED

    def _notice_abandoned_step(self) -> None:
        """Skip the step if its gradients are gone, or if the GradScaler has lowered its scale since it began."""
        if not self.scheme.hooks.seen:
            return
        # DeepSpeed keeps gradients elsewhere, and reports a step that it skips.
        gone = not self.engine.steps_inside and all(p.grad is None for p in self.engine.params())
        if gone or self._scale.has_dropped():
            self.discard()

    # Small things

    @property
    def _noted(self) -> StepStatistics | None:
        return self._step.statistics if self.collect_statistics else None

    @property
    def _unscale(self) -> float:
        """The factor that turns a gradient of the scaled loss into that of the mean loss that a direction is of."""
        share = self.loss_scale if self.config.is_local else 1.0
        return 1 / (share * self._scale.current())

    def _select(self, worker: int | None) -> int:
        """The number under which the worker's direction is kept."""
        if worker is not None:
            if not 0 <= worker < self.virtual_workers:
                raise ValueError(f"worker is {worker}; allowed: 0 to {self.virtual_workers - 1} (virtual_workers).")
            self._step.worker = worker
        return self._step.worker if self.config.is_local else 0

    def _observe(self, gradients: Buffers, clipped: bool) -> None:
        scale = self._scale if self.collect_statistics else None
        observe(self._step, self.step_count, self.scheme, self.engine, gradients, clipped, scale)

    def note_probe(self, worker: int) -> None:
        """Note that a fresh direction has been stored for a worker (0 in global scope)."""
        self._step.probed.add(worker)
        self._step.is_probed = True

    def _base_trains(self) -> None:
        """Put a base optimizer that has modes, such as a schedule-free one, into its training mode."""
        if hasattr(self.base, "train"):
            self.base.train()

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            if self.wants_probe:
                with self.probing():
                    closure()
            self.train()
            return closure()

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, and under `extrap` what this wrapper adds: tensors and numbers only.

        Directions that differ between processes are not in it: each process saves its own `local_state_dict`.
        """
        self.restore()
        return {**self.base.state_dict(), "extrap": state.shared_state(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or the base optimizer's state alone, with which directions start cold."""
        added = state_dict.get("extrap", {})
        state.check_shared_state(self, added)
        self.restore()
        self.reset_step()
        self.base.load_state_dict({name: value for name, value in state_dict.items() if name != "extrap"})
        state.load_shared_state(self, added)

    def local_state_dict(self) -> dict[str, Any]:
        """This process's own part: its workers' directions and curvatures, for `load_local_state_dict`."""
        return state.local_state(self)

    def load_local_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load `local_state_dict`; that of another scheme, world size or number of virtual workers is left out, with a
        warning, and directions start cold."""
        state.load_local_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        parts = ("engine", "scheme", "step", "_scale", "_step", "_given")
        saved = {name: value for name, value in self.__dict__.items() if name not in parts}
        return {**saved, "local_state": self.local_state_dict()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        local_state = saved.pop("local_state")
        self.__dict__.update(saved)
        self._assemble(Engine(self.base))
        self._given = []
        self.load_local_state_dict(local_state)
        self._initialize()

    def __repr__(self) -> str:
        return f"Extrapolated({self.base!r},\n{self.config!r}, virtual_workers={self.virtual_workers})"
