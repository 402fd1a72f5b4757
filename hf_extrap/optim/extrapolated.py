"""Extrapolated: the move to y and back, around any base optimizer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import checkpoint
from .base_iterate import BaseIterate
from .batch_norm import running_statistics_kept
from .capture import GradientCapture
from .config import ExtrapConfig
from .directions import last_update, noise
from .displacement import displace_, norms, scale_direction, total_norm
from .engines import Engine, engine_of, has_replicas
from .memory import Buffers, DirectionMemory, is_finite
from .preconditioner import adam_preconditioner
from .statistics import StepStatistics, clipping_factor, cosine, shrinking
from .step_size import StepSize
from .wrapper import OptimizerWrapper

logger = logging.getLogger(__name__)

NOWHERE = -1
"""Where parameters are that hold the y of a step given up."""


class Extrapolated(OptimizerWrapper):
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
    and `train(worker=k)`, with the loss divided by K. In global scope one `probing()` holds all K backward passes.

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
        self._memory = DirectionMemory(getattr(torch, config.direction_dtype) if config.direction_dtype else None)
        self._cold_after_load = False
        self._start()
        Optimizer.__setstate__(self, {})
        self._check_scope()

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
        self._check_scope()
        self._engine.follow(self._before_engine_step, self._after_engine_step)
        # Some engines take a step without gradients when they start.
        self.step_count = self.skipped_steps = 0

    def _start(self) -> None:
        """What holds within one step and is never saved."""
        self._x = BaseIterate()
        self._capture = GradientCapture()
        self._noted = StepStatistics()
        self._worker = 0
        self._probed: set[int] = set()
        self._pending_probe = False
        self._probing = False
        self._observed = False
        self._lengths: dict[int, Tensor] = {}
        self._first_scale: float | None = None
        self._preconditioner: Buffers | None = None

    def _params(self) -> list[Tensor]:
        return self._engine.params()

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
        self._check_engine()
        self.rest()
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
                if not by_hooks and not self._engine.steps_inside:
                    self._memory.store(key, self._gradients(1 / self._grad_scale()))
            if not by_hooks and self._engine.steps_inside:
                self._memory.store(key, self._gradients(1.0))
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
        self._check_engine()
        self._capture.attach(self._engine.leaves())
        if self.collect_statistics and self._capture.pass_squares is None:
            self._capture.pass_squares = []
        self._capture.start_pass()
        self._sizes.follow([options for options, _ in self._engine.groups()])
        if self._first_scale is None:
            self._first_scale = self._grad_scale()
        # An engine that clips by itself tells by how much.
        if self.config.captures(self.step_count) or (self._measures and not self._engine.steps_inside):
            buffers, filled = self._memory.start_capture(key, len(self._params()))
            unscale = self._unscale() if self.config.is_local else 1 / self._grad_scale()
            self._capture.into(buffers, filled, unscale, self._memory.dtype)
        if not self.config.is_active(self.step_count) or self._x.at == key:
            return
        if self.config.probes(self.step_count) and key not in self._probed:
            raise RuntimeError(
                f"direction {self.config.direction!r} needs a gradient at x first: "
                "`if optimizer.wants_probe: with optimizer.probing(): loss.backward()` before optimizer.train()."
            )
        self._move(key)

    def rest(self) -> None:
        """Put x back; within the step, `train` finds the same y again. Gradients that come until then are nobody's."""
        self._capture.stop()
        if self._x.moved:
            self._x.restore(self._params())
            self._engine.moved()
        self._x.at = None

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
        self._observe(self._gradients(1 / self._grad_scale()), clipped=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Put x back, then let the base optimizer step with the gradients.

        A gradient that is not finite leaves x and the base optimizer's state as they are, and drops past directions.

        Args:
            closure: for loops that are written with one; it is evaluated at y, and at x before where the step probes.

        Returns:
            The closure's loss, or None.
        """
        if self._engine.steps_inside:
            return self._step_part()
        loss = self._evaluate(closure) if closure is not None else None
        self.rest()
        if self.config.moves and not is_finite(self._gradients(1.0)):
            self.discard()
            return loss
        self._base_trains()
        gradients = self._gradients(1.0)
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
            self._x.keep(self._params(), (i for i, p in enumerate(self._engine.leaves()) if p.requires_grad))

    def _end_step(self, stepped: Sequence[bool]) -> None:
        self._look_back(stepped)
        self.step_count += 1
        self.reset_step()

    # A step inside an engine's

    def _before_engine_step(self, ends: bool) -> None:
        self.rest()
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
        gradients = self._gradients(1.0)
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
        self._memory.directions.clear()
        self.reset_step()

    def reset_step(self) -> None:
        """Forget what the step in progress has gathered (probes, captured gradients), and nothing else."""
        if self.collect_statistics:
            self.statistics = self._noted.summary()
        self._noted = StepStatistics()
        self._capture.forget()
        self._memory.forget_captured()
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

    # The move

    def _move(self, key: int) -> None:
        params = self._params()
        self._x.restore(params)
        direction = self._preconditioned(self._direction(key)) if self.config.precondition else self._direction(key)
        indices = [i for i, d in enumerate(direction) if d is not None]
        if not indices:
            return
        x = [params[i] for i in indices]
        last_step = self._last_step
        if self.config.scales_by_step:
            if last_step is None:
                return
            # A parameter that has joined since has not been stepped.
            last_step = torch.nn.functional.pad(last_step, (0, len(params) - len(last_step)))
            if self.config.scaling == "layer_step":
                last_step = last_step[indices]
        moves = scale_direction(self.config.scaling, [d for d in direction if d is not None], x, last_step)
        scaled = dict(zip(indices, moves, strict=True))
        self._x.leave(params, indices, key)
        steps = self._steps(key, scaled)
        for start, stop, step in steps:
            group = [i for i in range(start, stop) if i in scaled]
            seeds = [("rounding", self.config.seed, self.step_count, self._worker_number(key), i) for i in group]
            displace_([params[i] for i in group], [scaled[i] for i in group], step, seeds)
        self._engine.moved()
        if self.collect_statistics:
            self._noted.note("displacement_norm", total_norm([self._x.kept[i].sub(params[i]) for i in indices]))
            self._noted.note("step_size", torch.as_tensor(steps[0][2]).abs())

    def _steps(self, key: int, scaled: dict[int, Tensor]) -> list[tuple[int, int, float | Tensor]]:
        """(first parameter, one past the last, η) of each group, after the cap; keeps ‖x − y‖ where it is measured."""
        steps: list[tuple[int, int, float | Tensor]] = []
        start = 0
        for index, (options, params) in enumerate(self._engine.groups()):
            stop = start + len(params)
            steps.append((start, stop, self._sizes.of_group(index, options, key)))
            start = stop
        cap = self.config.max_displacement
        if cap is not None and self._last_step is not None:
            length = _length(scaled, steps)
            tiny = torch.finfo(length.dtype).tiny
            last_length = torch.linalg.vector_norm(self._last_step).to(length)
            factor = (cap * last_length / length.clamp_min(tiny)).clamp_max(1)
            steps = [(a, b, step * factor) for a, b, step in steps]
        if self._measures:
            self._lengths[key] = _length(self._in_metric(scaled, -0.5), steps)
        return steps

    def _preconditioned(self, direction: Buffers) -> Buffers:
        """P d; nothing for a parameter that the base optimizer has not stepped yet."""
        params = self._params()
        if self._preconditioner is None:
            self._preconditioner = adam_preconditioner(self.base, params)
        moved: Buffers = []
        for p, d, scale in zip(params, direction or [None] * len(params), self._preconditioner, strict=True):
            if d is not None and scale is None and self.state.get(p):
                raise ValueError(
                    f"precondition is true, but the base optimizer {type(self.base).__name__} keeps no exp_avg_sq and "
                    "step for each element; allowed: Adam and its kin, or precondition false."
                )
            moved.append(None if d is None or scale is None else scale * d)
        return moved

    def _in_metric(self, tensors: dict[int, Tensor], power: float) -> dict[int, Tensor]:
        """Each tensor times its Pᵖᵒʷᵉʳ; without a preconditioner the tensors themselves."""
        if (scales := self._preconditioner) is None:
            return tensors
        return {i: t if (scale := scales[i]) is None else t * scale.pow(power).to(t) for i, t in tensors.items()}

    def _direction(self, key: int) -> Buffers:
        params = self._params()
        if self.config.is_noise:
            moves = [p.requires_grad for p in self._engine.leaves()]
            drawn = iter(
                noise(
                    self.config.direction,
                    [p for p, moved in zip(params, moves, strict=True) if moved],
                    seed=self.config.seed,
                    step=self.step_count,
                    worker=self._worker_number(key),
                )
            )
            return [next(drawn) if moved else None for moved in moves]
        if key not in self._memory.directions and self._cold_after_load and self.step_count > 0:
            logger.warning("this worker's direction was not in the checkpoint: its first step does not extrapolate")
        self._cold_after_load = False
        return self._memory.directions.get(key, [])

    # After the pass at y

    def _observe(self, gradients: Buffers, clipped: bool) -> None:
        """Look at the averaged gradient once a step: statistics, and the curvature of global scope."""
        if self._observed:
            return
        self._observed = True
        if self._measures and not self.config.is_local and 0 in self._probed:
            factor = self._clipping_factor(gradients) if clipped else 1.0
            self._measure(0, [g if g is None else g / factor for g in gradients])
        if not self.collect_statistics:
            return
        square = total_norm([g for g in gradients if g is not None]).square()
        if (norm := self._engine.gradient_norm()) is not None:
            square = square.new_tensor(norm**2)
        self._noted.replace("gradient_square", square)
        if passes := self._capture.pass_squares:
            # Each pass's loss was divided by their number.
            factor = (len(passes) / self._grad_scale()) ** 2
            self._noted.replace("pass_square", *(square * factor for square in passes))
            self._noted.replace("passes", torch.tensor(float(len(passes))))
        self._noted.replace("direction_cosine", *(cosine(d, gradients) for d in self._directions_at_hand() if d))

    def _clipping_factor(self, gradients: Buffers) -> float | Tensor:
        """What clipping has multiplied the averaged gradient by."""
        if not self._engine.steps_inside:
            return clipping_factor(gradients, self._memory.captured_of(0))
        norm = self._engine.gradient_norm()
        return shrinking(total_norm([g for g in gradients if g is not None]), norm) if norm else 1.0

    def _directions_at_hand(self) -> list[Buffers]:
        """The directions of this step, or, from the past, the local gradients that will be the next one's."""
        if self.config.direction == "past_gradient" and self.config.is_local:
            return [self._memory.captured_of(worker) for worker in self._memory.captured_workers()]
        return list(self._memory.directions.values())

    def _measure(self, key: int, at_y: Buffers) -> None:
        """Smooth ‖g(y) − g(x)‖ / ‖y − x‖ into the curvature of a worker that has just probed."""
        at_x = self._memory.directions[key]
        pairs = enumerate(zip(at_y, at_x, strict=True))
        change = {i: a.sub(b.to(a)) for i, (a, b) in pairs if a is not None and b is not None}
        if change and key in self._lengths:
            seen = self._in_metric(change, 0.5)
            self._sizes.measure(key, total_norm(list(seen.values())), self._lengths[key])

    def _look_back(self, stepped: Sequence[bool]) -> None:
        """Turn what this step saw into what the next one looks along."""
        if self._measures and self.config.is_local:
            for worker in self._probed.intersection(self._memory.captured_workers()):
                self._measure(worker, self._memory.captured_of(worker))
        if self._needs_step_length:
            params = self._params()
            lengths = norms([x.sub(params[i]) for i, x in self._x.kept.items()])
            self._last_step = lengths.new_zeros(len(params)).index_copy_(
                0, torch.tensor(list(self._x.kept), device=lengths.device), lengths
            )
            self._noted.note("step_length", torch.linalg.vector_norm(lengths))
        if not self.config.is_past or not self.config.is_active(self.step_count + 1):
            self._memory.directions.clear()
        elif self.config.direction == "past_update":
            self._memory.store(0, last_update(self._engine.groups(), stepped, self._x.kept, self._sizes.learning_rate))
        elif self.config.is_local:
            self._memory.turn_captured_into_directions()

    def _gradients(self, unscale: float) -> Buffers:
        return [g if g is None or unscale == 1 else g * unscale for g in self._engine.gradients()]

    # What the configuration asks of this step

    @property
    def _needs_step_length(self) -> bool:
        return self.config.max_displacement is not None or self.config.scales_by_step or self.collect_statistics

    @property
    def _keeps_averaged_gradient(self) -> bool:
        config = self.config
        return config.direction == "past_gradient" and not config.is_local and config.is_active(self.step_count + 1)

    @property
    def _measures(self) -> bool:
        return self.config.measures(self.step_count)

    def _key(self, worker: int) -> int:
        """Whose direction a worker uses: its own, or the one of all."""
        return worker if self.config.is_local else 0

    def _worker_number(self, key: int) -> int:
        """The number of this process's worker among those of all processes; 0 for all in global scope."""
        rank, world_size = self._engine.worker()
        return key * world_size + rank if self.config.is_local else 0

    def _select(self, worker: int | None) -> int:
        if worker is not None:
            if not 0 <= worker < self.virtual_workers:
                raise ValueError(f"worker is {worker}; allowed: 0 to {self.virtual_workers - 1} (virtual_workers).")
            self._worker = worker
        return self._worker

    # Small things

    def _grad_scale(self) -> float:
        scaler = self.grad_scaler
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        return scale * self._engine.loss_scale

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
            return model.no_sync()
        return nullcontext()

    def _check_scope(self) -> None:
        sharded = self._engine.is_sharded or any(
            isinstance(p, DTensor) or type(p).__name__ == "FlatParameter" or hasattr(p, "ds_id") for p in self._params()
        )
        # Before connect, sharded parameters of several replicas may yet turn out to be HSDP's.
        has_own = self._engine.has_local_gradients or (type(self._engine) is Engine and has_replicas(self.base))
        if sharded and not has_own and self.config.is_local and self.config.direction != "none":
            raise ValueError(
                "scope is 'local', but the parameters are sharded (FSDP or ZeRO-3), so that no worker has its own y; "
                "allowed: scope 'global' (extragradient, optimistic, past-update, noise), fully_shard over a mesh of "
                "replicas and shards (HSDP), or unsharded weights."
            )
        if self._engine.is_sharded and self.config.scaling == "filter" and "stage 3" in self._engine.name:
            raise ValueError("scaling is 'filter', but ZeRO-3 cuts through filters; allowed: layer, or another engine.")
        if self._engine.steps_inside and self.config.precondition:
            raise ValueError(
                f"precondition is true, but under {self._engine.name} the state of the base optimizer lies in flat "
                "parts; allowed: precondition false, or past-update."
            )

    def _check_engine(self) -> None:
        """An engine that has replaced the parameters must be known before anything is moved."""
        if self._given:
            params = self._params()
            if type(self._engine) is Engine and any(isinstance(p, DTensor) for p in params):
                raise RuntimeError("the parameters are sharded: call optimizer.connect(model) before training.")
            if len(params) < len(self._given) or any(
                (given := ref()) is not None and given is not p for ref, p in zip(self._given, params, strict=False)
            ):
                raise RuntimeError(
                    "an engine has put other tensors in the place of the parameters: call optimizer.connect(engine), "
                    "with what deepspeed.initialize returned, before training."
                )

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
        within_step = {*vars(Extrapolated._blank()), "step", "_engine", "_given"}
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
        blank._start()
        return blank

    def __repr__(self) -> str:
        return f"Extrapolated({self.base!r},\n{self.config!r}, virtual_workers={self.virtual_workers})"


def _length(moves: dict[int, Tensor], steps: Sequence[tuple[int, int, float | Tensor]]) -> Tensor:
    """The length of moves by parameter, each times the η of its group."""
    parts = [total_norm([moves[i] for i in range(a, b) if i in moves]) for a, b, _ in steps]
    return total_norm([(part * step).to(parts[0]) for part, (_, _, step) in zip(parts, steps, strict=True)])
