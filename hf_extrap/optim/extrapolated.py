"""Extrapolated: the move to y and back, around any base optimizer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import checkpoint
from .base_iterate import BaseIterate
from .batch_norm import running_statistics_kept
from .capture import GradientCapture
from .config import ExtrapConfig
from .displacement import copy_
from .engines import Engine, check_known, check_scheme, engine_of
from .looking_back import LookingBack
from .memory import Buffers, DirectionMemory, is_finite
from .spares import Owners
from .statistics import StepStatistics
from .step_size import StepSize

logger = logging.getLogger(__name__)

NOWHERE = -1
"""Where parameters are that hold the y of a step given up."""


class Extrapolated(LookingBack):
    """Takes the gradient at an extrapolated point y = x − η · S(d, x), and steps the parameters x with any optimizer.

    At rest the parameters are x. A training loop gains one line, and for fresh directions (`config.is_fresh`, or `auto`
    with a past direction now and then) two more:

        if optimizer.wants_probe:
            with optimizer.probing() as backward:
                backward(loss(batch))       # at x; leaves .grad and the random state as they were
        optimizer.train()                   # x → y
        loss(batch).backward()
        optimizer.step()                    # y → x, then the base optimizer's step

    Under DeepSpeed and FSDP2 call `connect` once with the prepared model.

    With K virtual workers, K accumulation micro-batches each play a worker with its own y and d: `probing(worker=k)`
    and `train(worker=k)`, all of one worker before those of the next, with the loss divided by K. In global scope one
    `probing()` holds all K backward passes.

    Args:
        base: the optimizer that steps x. Its groups, state, defaults and state dict are this one's.
        config: the scheme.
        virtual_workers: workers that this process plays, one after another.
        grad_scaler: the `torch.amp.GradScaler` in use, if any, whose scale is taken out of the directions.

    Attributes:
        loss_scale: what a worker's mean loss is multiplied by before backward, 1 / virtual_workers unless set.
        step_count: steps taken.
        skipped_steps: steps given up for an overflow or a gradient that is not finite.
        collect_statistics: whether the next step fills `statistics`.
        statistics: of the last step that collected any: `displacement_norm`, `step_length` (of x), `step_size`,
            `direction_cosine` (of the local direction with the averaged gradient), `gradient_square` (‖ḡ‖²),
            `pass_square` (mean of ‖g‖² over this process's passes, each in the units of the mean loss), `passes`.

    Raises:
        TypeError: if `base` is not a torch optimizer.
        ValueError: for local scope over parameters that are sharded, or fewer than one virtual worker.

    Source: Lin, Kong, Stich, Jaggi, "Extrapolation for Large-batch Training in Deep Learning", ICML 2020.
    """

    _capture: GradientCapture

    def __init__(
        self,
        base: Optimizer,
        config: ExtrapConfig,
        *,
        virtual_workers: int = 1,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not isinstance(base, Optimizer) or isinstance(base, Extrapolated):
            raise TypeError(f"base is a {type(base).__name__}; allowed: any torch.optim.Optimizer but Extrapolated.")
        if virtual_workers < 1:
            raise ValueError(f"virtual_workers is {virtual_workers}; allowed: a whole number >= 1.")
        self.base = base
        self.config = config
        self.virtual_workers = virtual_workers
        self.grad_scaler = grad_scaler
        self.loss_scale = 1 / virtual_workers
        self.step_count = 0
        self.skipped_steps = 0
        self.collect_statistics = False
        self.statistics: dict[str, float] = {}
        self._engine = Engine(base)
        self._given = [weakref.ref(p) for p in self._params()]
        self._sizes = StepSize(config)
        self._last_step: Tensor | None = None
        dtype = getattr(torch, config.direction_dtype) if config.direction_dtype else None
        self._memory = DirectionMemory(dtype, on_host=config.direction_device == "cpu")
        self._cold_after_load = False
        self._start()
        Optimizer.__setstate__(self, {})
        check_scheme(self.config, self._engine, self.base)

    def connect(self, model: torch.nn.Module) -> None:
        """Meet the engine that holds the parameters, before training and before a state is loaded.

        Args:
            model: what `deepspeed.initialize` returned, with this optimizer as its client optimizer, or a module after
                `fully_shard`; any other module changes nothing.

        Raises:
            ValueError: for a scheme that the engine cannot carry out.
            RuntimeError: if it is called in the middle of a step.
        """
        if self._capture.seen or self._x.at is not None:
            raise RuntimeError("connect was called in the middle of a step; allowed: between two steps.")
        self._engine = engine_of(model, self.base)
        self._given = []
        self._start()
        self._capture = self._engine.capture()
        self._capture.spares = self._memory.spares
        check_scheme(self.config, self._engine, self.base)
        self._engine.follow(self._before_engine_step, self._after_engine_step)
        # Some engines take a step without gradients when they start.
        self.step_count = self.skipped_steps = 0

    def _start(self) -> None:
        """What holds within one step and is never saved."""
        self._x = BaseIterate(self._memory.spares)
        self._owners = Owners()
        self._before: dict[int, Tensor] = {}
        self._capture = GradientCapture()
        self._capture.spares = self._memory.spares
        self._noted = StepStatistics()
        self._worker = 0
        self._probed: set[int] = set()
        self._pending_probe = False
        self._probing = False
        self._only_looks = False
        self._observed = False
        self._lengths: dict[int, Tensor] = {}
        self._first_scale: float | None = None
        self._preconditioner: Buffers | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; with gradients of a step that was not taken, the step is given up (see `discard`)."""
        if self._capture.seen and not self._probing:
            self.discard()
        self.base.zero_grad(set_to_none)

    # One step

    @property
    def wants_probe(self) -> bool:
        """Whether a gradient at x, inside `probing`, must come before the next `train`."""
        self._notice_abandoned_step()
        if self._pending_probe or not self.config.probes(self.step_count):
            return False
        return len(self._probed) < (self.virtual_workers if self.config.is_local else 1)

    @contextmanager
    def probing(
        self, worker: int | None = None, model: torch.nn.Module | None = None
    ) -> Iterator[Callable[[Tensor], None]]:
        """Backward passes inside give the worker's fresh direction, at x.

        Args:
            worker: the virtual worker; global scope has one direction for all.
            model: the module that is passed: its BatchNorm layers do not count the batch, which the pass at y does; and
                with DistributedDataParallel, local scope is spared the averaging that it has no use for.

        Yields:
            The function that passes a loss backward: `loss.backward()`, or what DeepSpeed has in its place.

        Gradients already in `.grad` are kept aside and put back, and so is the random state, so that the pass at y
        meets the same dropout masks (with `batch: independent` the masks are independent too).
        """
        key = self._key(self._select(worker))
        check_known(self._engine, self._given)
        self._rest(keep=self._x.at == key)
        self._base_trains()
        leaves, local = self._engine.leaves(), self.config.is_local
        by_hooks = local or self._engine.probes_by_hooks
        self._capture.attach(leaves)
        seen, squares = self._capture.seen, self._capture.pass_squares
        self._capture.pass_squares = None
        direction, filled = self._memory.start_direction(key, len(leaves)), set[int]()
        if by_hooks:
            unscale = self._unscale() if local else 1 / self._grad_scale()
            self._capture.into(direction, filled, unscale, self._memory.dtype)
        self._probing = True
        self._capture.listening = True
        try:
            with self._engine.probing() as backward:
                with self._random_state_kept(), self._unaveraged(model), running_statistics_kept(model):
                    yield backward
                if not by_hooks:
                    self._memory.store(key, _times(self._engine.probed(), 1 / self._grad_scale()))
            if by_hooks:
                self._memory.directions[key] = [d if i in filled else None for i, d in enumerate(direction)]
                if not local:
                    self._engine.average(self._memory.directions[key])
            self._probed.add(key)
            self._pending_probe = True
        except BaseException:
            self._memory.directions.pop(key, None)
            raise
        finally:
            self._probing = False
            self._capture.stop()
            self._capture.seen, self._capture.pass_squares = seen, squares

    @torch.no_grad()
    def train(self, worker: int | None = None) -> None:
        """Move the parameters from x to the worker's y, before its forward pass; a second call changes nothing.

        Raises:
            RuntimeError: if the step needs a fresh direction and no `probing` came before.
            ValueError: for a worker outside range(virtual_workers).
        """
        self._notice_abandoned_step()
        key = self._key(self._select(worker))
        self._pending_probe = False
        self._observed = False
        if self._x.at is None:
            self._base_trains()
        if self.config.direction == "none" and not self.collect_statistics:
            return
        check_known(self._engine, self._given)
        self._capture.attach(self._engine.leaves())
        if self.collect_statistics and self._capture.pass_squares is None:
            self._capture.pass_squares = []
        self._capture.start_pass()
        self._sizes.follow([options for options, _ in self._engine.groups()])
        if self._first_scale is None:
            self._first_scale = self._grad_scale()
        if self.config.is_active(self.step_count) and self._x.at != key:
            if self.config.probes(self.step_count) and key not in self._probed:
                raise RuntimeError(
                    f"direction {self.config.direction!r} needs a gradient at x first: "
                    "`if optimizer.wants_probe: with optimizer.probing(): loss.backward()` before optimizer.train()."
                )
            self._move(key)
        # After the move, which frees memory. An engine that clips by itself tells by how much.
        if self.config.captures(self.step_count) or (self._measures and not self._engine.steps_inside):
            buffers, filled = self._memory.start_capture(key, len(self._params()))
            unscale = self._unscale() if self.config.is_local else 1 / self._grad_scale()
            self._capture.into(buffers, filled, unscale, self._memory.dtype)

    @contextmanager
    def looking(self, worker: int | None = None) -> Iterator[None]:
        """Between two steps: inside, the parameters hold the y that the worker's next step would look from.

        Nothing of it is left behind, and no direction is spent. A fresh direction comes from `probing` before.
        """
        collect, self.collect_statistics = self.collect_statistics, False
        self._only_looks = True
        try:
            self.train(worker)
            yield
        finally:
            self._rest()
            self.reset_step()
            self._only_looks, self.collect_statistics = False, collect

    def rest(self) -> None:
        """Put x back; within the step, `train` finds the same y again. Gradients that come until then are nobody's."""
        self._rest(keep=True)

    def _rest(self, keep: bool = False) -> None:
        """Put x back; with `keep`, y of a step in progress is kept for the next `train`."""
        self._capture.stop()
        moved = bool(self._x.moved)
        self._x.restore(self._params(), keep and self._x.at != NOWHERE)
        if moved:
            self._engine.moved()

    def eval(self) -> None:
        """Put x back, and put a base optimizer that has modes into its evaluation mode."""
        self.rest()
        if hasattr(self.base, "eval"):
            self.base.eval()

    @torch.no_grad()
    def observe(self) -> None:
        """Look at the averaged gradient after a step's last backward pass and before it is clipped.

        Statistics want it whole; without this call `step` takes it as it finds it.
        """
        self._observe(_times(self._engine.gradients(), 1 / self._grad_scale()), clipped=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Put x back, then let the base optimizer step with the gradients.

        A gradient that is not finite leaves x and the base optimizer's state as they are, and drops past directions
        (`check_finite`).

        Args:
            closure: for loops that are written with one; it is evaluated at y, and at x before where the step probes.

        Returns:
            The closure's loss, or None.
        """
        if self._engine.steps_inside:
            return self._step_part()
        if self.config.direction == "none" and not (self.collect_statistics or self._capture.seen):
            # Nothing has been asked of this step.
            self._base_trains()
            self.step_count += 1
            return self.base.step(closure)
        loss = self._evaluate(closure) if closure is not None else None
        self._rest()
        gradients = self._engine.gradients()
        if self.config.moves and self.config.check_finite and not is_finite(gradients):
            self.discard()
            return loss
        self._base_trains()
        self._observe(gradients, clipped=True)
        self._keep_x()
        if self._keeps_averaged_gradient:
            # Before the step: some optimizers, such as LARS, turn .grad into their update.
            self._memory.store(0, gradients)
        stepped = [g is not None for g in gradients]
        self.base.step()
        self._end_step(stepped)
        return loss

    def _keep_x(self) -> None:
        if self._needs_step_length or self.config.direction == "past_update":
            params = self._params()
            indices = [i for i, p in enumerate(self._engine.leaves()) if p.requires_grad]
            self._before = {i: self._memory.spares.take(i, params[i]) for i in indices}
            copy_(list(self._before.values()), [params[i] for i in indices])

    def _end_step(self, stepped: Sequence[bool]) -> None:
        self._look_back(stepped)
        self.step_count += 1
        self.reset_step()

    # A step inside an engine's

    def _before_engine_step(self, ends: bool) -> None:
        self._rest(keep=not ends)
        if ends and self._engine.steps_inside:
            self._keep_x()
        elif ends and self.collect_statistics:
            self.observe()

    def _step_part(self) -> None:
        """The base optimizer's step with the groups that the engine has put into it."""
        if self._keeps_averaged_gradient or self.collect_statistics or (self._measures and not self.config.is_local):
            self._engine.collect([p for group in self.param_groups for p in group["params"]])
        self._base_trains()
        self.base.step()

    @torch.no_grad()
    def _after_engine_step(self, taken: bool) -> None:
        """The engine has written x of the next step, or has given the step up."""
        if not taken:
            self.discard()
            return
        gradients = self._engine.gradients()
        self._observe(gradients, clipped=True)
        if self._keeps_averaged_gradient:
            self._memory.store(0, gradients)
        self._end_step([p.requires_grad for p in self._engine.leaves()])

    def discard(self) -> None:
        """Give up the step in progress: x is put back, past directions are dropped, and the skip is counted."""
        self.skipped_steps += 1
        logger.warning(
            "step %d was skipped (overflow, or a gradient that is not finite); %d skipped so far",
            self.step_count,
            self.skipped_steps,
        )
        self._memory.drop_directions()
        self.reset_step()

    def reset_step(self) -> None:
        """Forget what the step in progress has gathered (probes, captured gradients), and nothing else."""
        if self.collect_statistics:
            self.statistics = self._noted.summary()
        self._noted = StepStatistics()
        self._capture.forget()
        self._memory.forget_captured()
        self._x.forget()
        self._probed.clear()
        self._pending_probe = False
        self._worker = 0
        self._lengths = {}
        self._observed = False
        self._first_scale = None
        self._preconditioner = None
        if self._x.at is not None:
            # Parameters must not move between a forward and its backward pass: the next train() moves them.
            self._x.at = NOWHERE

    # Small things

    def _select(self, worker: int | None) -> int:
        if worker is not None:
            if not 0 <= worker < self.virtual_workers:
                raise ValueError(f"worker is {worker}; allowed: 0 to {self.virtual_workers - 1} (virtual_workers).")
            self._worker = worker
        return self._worker

    def _unscale(self) -> float:
        """The factor that turns a worker's gradient of the scaled loss into that of its mean loss."""
        return 1 / (self.loss_scale * self._grad_scale())

    def _notice_abandoned_step(self) -> None:
        """A step was given up if its gradients are gone, or if the GradScaler has lowered its scale since it began."""
        if not self._capture.seen:
            return
        overflow = self._first_scale is not None and self._grad_scale() < self._first_scale
        if overflow or self._gradients_are_gone():
            self.discard()

    def _gradients_are_gone(self) -> bool:
        # DeepSpeed keeps gradients elsewhere, and tells of a step that it gives up.
        return not self._engine.steps_inside and all(p.grad is None for p in self._params())

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

    def _random_state_kept(self, always: bool = False) -> Any:
        if self.config.batch == "independent" and not always:
            return nullcontext()
        devices = {p.device for p in self._params() if p.device.type not in ("cpu", "meta")}
        if not devices:
            return torch.random.fork_rng(devices=[])
        kind = next(iter(devices)).type
        return torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices), device_type=kind)

    def _unaveraged(self, model: torch.nn.Module | None) -> Any:
        if self.config.is_local and isinstance(model, DistributedDataParallel):
            # A static graph's first pass must be averaged: DDP learns from it when a gradient is ready.
            if not model.static_graph or model._static_graph_delay_allreduce_enqueued:
                return model.no_sync()
        return nullcontext()

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, and under `extrap` what this wrapper adds: tensors and numbers only.

        Directions that differ between processes are not in it: each process saves its own `local_state_dict`.
        """
        self.rest()
        return {**self.base.state_dict(), "extrap": checkpoint.shared_state(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; that of the base optimizer alone is taken too, and directions start cold."""
        self.rest()
        self.reset_step()
        self.base.load_state_dict({name: value for name, value in state_dict.items() if name != "extrap"})
        checkpoint.load_shared_state(self, state_dict.get("extrap", {}))

    def local_state_dict(self) -> dict[str, Any]:
        """What is this process's own: its workers' directions and curvatures, for `load_local_state_dict`."""
        return checkpoint.local_state(self)

    def load_local_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load `local_state_dict`; that of another scheme, world size or number of virtual workers is left out, with a
        warning, and directions start cold."""
        checkpoint.load_local_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self.rest()
        within_step = {*vars(Extrapolated._blank()), "step", "_engine", "_given"} - {"_memory"}
        return {k: v for k, v in self.__dict__.items() if k not in within_step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._engine = Engine(self.base)
        self._given = []
        self._start()
        Optimizer.__setstate__(self, {})

    @staticmethod
    def _blank() -> Extrapolated:
        blank = object.__new__(Extrapolated)
        blank._memory = DirectionMemory(None)
        blank._start()
        return blank

    def __repr__(self) -> str:
        return f"Extrapolated({self.base!r},\n{self.config!r}, virtual_workers={self.virtual_workers})"


def _times(gradients: Buffers, factor: float) -> Buffers:
    return [g if g is None or factor == 1 else g * factor for g in gradients]
