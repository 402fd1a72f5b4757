"""Extrapolated: takes gradients at an extrapolated point, around any base optimizer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import state
from .buffers import Buffers
from .config import ExtrapConfig
from .displacement import ABANDONED
from .engine_steps import EngineSteps, step_part
from .engines import Engine, check_arguments, check_known, check_params, check_scheme, engine_of, needs_closure
from .foreach import is_finite
from .loss_scale import LossScale
from .probing import evaluate, fresh_gradient, scaled
from .scheme import Scheme
from .step_in_progress import StepInProgress
from .wrapper import OptimizerWrapper

Scaler = torch.amp.GradScaler
Backward = Callable[[Tensor], None]
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

    Under DeepSpeed and FSDP2 call `connect` once with the prepared model. With K virtual workers, K accumulation
    micro-batches each act as a worker with its own y and d: call `probing(worker=k)` and `train(worker=k)`, all of one
    worker before those of the next, with the loss divided by K. In global scope one `probing()` holds all K passes.

    Args:
        base: the optimizer that steps x. Its groups, state, defaults and state dict are this one's.
        config: the scheme.
        virtual_workers: workers that this process plays, one after another.
        grad_scaler: the `torch.amp.GradScaler` in use, if any, whose scale is taken out of the directions.

    Attributes:
        loss_scale: factor of a worker's mean loss before backward, 1 / virtual_workers unless set.
        step_count: steps taken.
        skipped_steps, skipped_in_a_row: steps skipped for an overflow or a gradient that is not finite; the last ones.
        collect_statistics: whether the next step fills `statistics`.
        statistics: of the last step that collected any; see `StepStatistics`.
        is_resumed: whether a state has been loaded.
        engine, scheme, in_progress: holder of the parameters; direction, scaling and step size; state of the step.

    Source: Lin, Kong, Stich, Jaggi, "Extrapolation for Large-batch Training in Deep Learning", ICML 2020.
    """

    def __init__(
        self, base: Optimizer, config: ExtrapConfig, *, virtual_workers: int = 1, grad_scaler: Scaler | None = None
    ) -> None:
        check_arguments(base, config, virtual_workers)
        self.base, self.config, self.virtual_workers, self.grad_scaler = base, config, virtual_workers, grad_scaler
        self.loss_scale = 1 / virtual_workers
        self.step_count = self.skipped_steps = self.skipped_in_a_row = 0
        self.collect_statistics = self.is_resumed = False
        self.statistics: dict[str, float] = {}
        self._assemble(Engine(base))
        self._given = [weakref.ref(p) for p in self._params()]
        self._initialize()

    def _assemble(self, engine: Engine) -> None:
        """Make the parts for an engine."""
        check_scheme(self.config, engine, self.base)
        self.engine = engine
        self.scheme = Scheme(self.config, engine, self.base)
        self.in_progress = self._new_step()
        self._given = []

    def connect(self, model: nn.Module) -> None:
        """Set the engine that holds the parameters, before training; a state may be loaded before or after.

        Args:
            model: what `deepspeed.initialize` returned, with this optimizer as its client optimizer, or a module after
                `fully_shard`; any other module changes nothing.
        """
        if self.scheme.hooks.seen or self.scheme.displacement.worker is not None:
            raise RuntimeError("connect was called in the middle of a step; allowed: between two steps.")
        if not self.is_resumed:
            # Some engines take a step without gradients when they start.
            self.step_count = self.skipped_steps = self.skipped_in_a_row = 0
        before = self.scheme
        self._assemble(engine_of(model, self.base))
        self.scheme.take_over(before)
        steps = EngineSteps(self)
        self.engine.follow(steps.before, steps.after)

    # Before the gradient at y

    @property
    def wants_probe(self) -> bool:
        """Whether a gradient at x, inside `probing`, must come before the next `train`."""
        self.notice_skip()
        step, needed = self.in_progress, self.virtual_workers if self.config.is_local else 1
        return not step.is_probed and self.scheme.needs_probe(self.step_count) and len(step.probed) < needed

    @contextmanager
    def probing(self, worker: int | None = None, model: nn.Module | None = None) -> Iterator[Backward]:
        """Backward passes inside give the worker's fresh direction, at x; yields the function that starts one.

        `.grad` stays as it is, and so does the random state, so that the pass at y has the same dropout masks; with
        `batch: independent` the masks are independent too.

        Args:
            worker: the virtual worker; global scope has one direction for all.
            model: the module that is passed. Its BatchNorm layers count the batch at y alone, and in local scope
                DistributedDataParallel does not average this gradient.
        """
        key = self.in_progress.select(worker, self.virtual_workers)
        check_known(self.engine, self._given)
        self.restore(keep=self.scheme.displacement.worker == key)
        self.train_base()
        same_masks = self.config.batch != "independent"
        with fresh_gradient(self.scheme, self.engine, key, self._unscale(), model, same_masks) as backward:
            yield backward
        self.in_progress.mark_probed(key)

    @torch.no_grad()
    def train(self, worker: int | None = None) -> None:
        """Move the parameters from x to the worker's y, before its forward pass; a second call changes nothing."""
        self.notice_skip()
        scheme, step, number = self.scheme, self.in_progress, self.step_count
        key = step.select(worker, self.virtual_workers)
        step.is_probed = step.is_observed = False
        if scheme.displacement.worker is None:
            self.train_base()
        if self.config.direction == "none" and not self.collect_statistics:
            return
        check_known(self.engine, self._given)
        scheme.hooks.start_pass(self.engine.leaves(), self.collect_statistics)
        scheme.step_size.follow([options for options, _ in self.engine.groups()])
        step.scale.note()
        if self.config.is_active(number) and scheme.displacement.worker != key:
            if scheme.needs_probe(number) and key not in step.probed:
                raise RuntimeError(
                    f"direction {self.config.direction!r} needs a gradient at x first: "
                    "`if optimizer.wants_probe: with optimizer.probing(): loss.backward()` before optimizer.train()."
                )
            noted = step.statistics if self.collect_statistics else None
            scheme.extrapolate(key, number, noted, step.keeps_directions)
        # After the move, which frees memory. An engine that clips by itself reports by how much.
        if scheme.needs_local_gradients(number) or (scheme.measures_curvature(number) and not self.engine.steps_inside):
            scheme.local_gradients.receive(key, len(self.engine.params()), self._unscale())

    @contextmanager
    def extrapolating(self, worker: int | None = None) -> Iterator[None]:
        """Inside, between two steps, the parameters hold the y of the worker's next step, which is not affected."""
        collect, self.collect_statistics = self.collect_statistics, False
        self.in_progress.keeps_directions = True
        try:
            self.train(worker)
            yield
        finally:
            self.restore(keep=False)
            self.reset_step()
            self.collect_statistics = collect

    # The step

    def restore(self, keep: bool = True) -> None:
        """Put x back. With `keep`, the step's next `train` moves to the same y; gradients until then are ignored."""
        self.scheme.hooks.stop()
        self.scheme.displacement.restore(keep and self.scheme.displacement.worker != ABANDONED)

    def eval(self) -> None:
        """Put x back, and put a base optimizer that has modes into its evaluation mode."""
        self.restore()
        getattr(self.base, "eval", lambda: None)()

    @torch.no_grad()
    def observe(self) -> None:
        """Observe the averaged gradient for statistics before it is clipped; without this call, `step` observes it."""
        gradients = scaled(self.engine.gradients(), 1 / self.in_progress.scale.current())
        self.in_progress.observe(self.step_count, gradients, clipped=False, collects=self.collect_statistics)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Restore x, then let the base optimizer step with the gradients; returns the closure's loss.

        With `check_finite`, a gradient that is not finite leaves x and the base optimizer's state as they are, and
        drops past directions. A closure is evaluated at y, and before at x if the step probes.
        """
        if self.engine.steps_inside:
            return step_part(self)
        observes = self.collect_statistics or self.scheme.hooks.seen
        if needs_closure(self.base) or (self.config.direction == "none" and not observes):
            # LBFGS evaluates its closure many times a step: there is no gradient of the step to observe.
            self.scheme.hooks.forget()
            self.train_base()
            self.step_count += 1
            return self.base.step(closure)
        loss = evaluate(self, closure) if closure is not None else None
        self.restore(keep=False)
        gradients = self.engine.gradients()
        if self.config.moves and self.config.check_finite and not is_finite(gradients):
            self.discard()
            return loss
        self.train_base()
        self.scheme.before_step(self.step_count, self.collect_statistics)
        # Before the step: some optimizers, such as LARS, turn .grad into their update.
        self.keep_gradients(gradients)
        self.base.step()
        self.end_step([g is not None for g in gradients])
        return loss

    def keep_gradients(self, gradients: Buffers) -> None:
        """Observe the averaged gradient of a step that is taken, and keep it if it is the next direction."""
        self.in_progress.observe(self.step_count, gradients, clipped=True, collects=self.collect_statistics)
        self.scheme.direction.keep_averaged_gradient(self.step_count, gradients)

    def end_step(self, stepped: Sequence[bool]) -> None:
        """Remember a step that has been taken, with the parameters for which `stepped` is true."""
        noted = self.in_progress.statistics if self.collect_statistics else None
        self.scheme.after_step(self.step_count, stepped, self.in_progress.probed, noted)
        self.step_count += 1
        self.skipped_in_a_row = 0
        self.reset_step()

    # A step that is not taken

    def notice_skip(self) -> None:
        """Discard a step that ended without `step`, such as one that a `GradScaler` has withheld."""
        if self.in_progress.was_abandoned():
            self.discard()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; gradients that were not stepped with make it a skipped step (see `discard`)."""
        if self.scheme.hooks.seen and not self.scheme.hooks.is_aside:
            self.discard()
        self.base.zero_grad(set_to_none)

    def discard(self) -> None:
        """Skip the step in progress: restore x, drop past directions, and warn of the 1st, 2nd, 4th, ... in a row."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row.bit_count() == 1:
            message = "step %d was skipped (overflow, or a gradient that is not finite); %d in a row, %d so far"
            logger.warning(message, self.step_count, self.skipped_in_a_row, self.skipped_steps)
        self.scheme.direction.store.clear()
        self.reset_step()

    def reset_step(self) -> None:
        """Forget what the step in progress has gathered (fresh directions, local gradients), and nothing else."""
        if self.collect_statistics:
            self.statistics = self.in_progress.statistics.summary()
        self.scheme.forget_step()
        self.in_progress = self._new_step()
        if self.scheme.displacement.worker is not None:
            # Parameters must not change between a forward and its backward pass: the next train() moves them.
            self.scheme.displacement.worker = ABANDONED

    def _new_step(self) -> StepInProgress:
        return StepInProgress(self.scheme, self.engine, LossScale(self.engine, self.grad_scaler))

    def _unscale(self) -> float:
        """The factor that turns a gradient of the scaled loss into that of the mean loss that a direction is of."""
        return 1 / ((self.loss_scale if self.config.is_local else 1.0) * self.in_progress.scale.current())

    def _check_params(self) -> None:
        check_params(self._params(), self.config)

    # Saving
    _whole_state = state.whole_state
    _load_whole_state = state.load_whole_state
    local_state_dict = state.local_state_dict
    load_local_state_dict = state.load_local_state_dict

    def __getstate__(self) -> dict[str, Any]:
        x = state.restored(self)
        parts = ("engine", "scheme", "in_progress", "step", "_given")
        saved = {name: value for name, value in self.__dict__.items() if name not in parts}
        return {**saved, "local_state": self.local_state_dict(), "x": x}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        local_state, x = saved.pop("local_state"), saved.pop("x")
        self.__dict__.update(saved)
        self._assemble(Engine(self.base))
        self.load_local_state_dict(local_state)
        self._initialize()
        state.put_back(self, x)
