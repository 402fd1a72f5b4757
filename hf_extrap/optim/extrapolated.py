"""Extrapolated: the move to y and back, around any base optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoint
from .capture import GradientCapture
from .config import ExtrapConfig
from .directions import noise
from .displacement import copy_, displace_, scale_direction, total_norm
from .step_size import StepSize

logger = logging.getLogger(__name__)

Buffers = list[Tensor | None]


class Extrapolated(Optimizer):
    """Takes the gradient at an extrapolated point y = x − η · S(d, x), and steps the parameters x with any optimizer.

    At rest the parameters are x. A training loop gains one line, and for fresh directions (`config.is_fresh`, or `auto`
    with a past direction now and then) two more:

        if optimizer.wants_probe:
            with optimizer.probing():
                loss(batch).backward()      # at x; leaves .grad and the random state as they were
        optimizer.train()                   # x → y
        loss(batch).backward()
        optimizer.step()                    # y → x, then the base optimizer's step

    With K virtual workers, K accumulation micro-batches each play a worker with its own y and d: `probing(worker=k)` and
    `train(worker=k)`, with the loss divided by K. In global scope one `probing()` holds all K backward passes.

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
        statistics: of the last step that collected any: `displacement_norm`, `step_size`, `direction_cosine` (of the
            local direction with the averaged gradient), `gradient_square` (‖ḡ‖²), `pass_square` (mean of ‖g‖² over
            this process's passes, each in the units of the mean loss), `passes`.

    Raises:
        TypeError: if `base` is not a torch optimizer.
        ValueError: for local scope over parameters that are sharded, or fewer than one virtual worker.

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
        if not isinstance(base, Optimizer) or isinstance(base, Extrapolated):
            raise TypeError(f"base is a {type(base).__name__}; allowed: a torch.optim.Optimizer that is not Extrapolated.")
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
        self._sizes = StepSize(config)
        self._last_length: Tensor | None = None
        self._directions: dict[int, Buffers] = {}
        self._cold_after_load = False
        self._start()
        Optimizer.__setstate__(self, {})
        self._check_engine()

    def _start(self) -> None:
        """What holds within one step and is never saved."""
        self._capture = GradientCapture()
        self._captured: dict[int, Buffers] = {}
        self._filled: dict[int, set[int]] = {}
        self._x: dict[int, Tensor] = {}
        self._moved: list[int] = []
        self._at: int | None = None
        self._worker = 0
        self._probed: set[int] = set()
        self._pending_probe = False
        self._probing = False
        self._observed = False
        self._lengths: dict[int, Tensor] = {}
        self._seen_statistics: dict[str, list[Tensor]] = {}

    # The base optimizer's face

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's own groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's own state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's own defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base.add_param_group(param_group)

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
        if self._pending_probe or not self._is_probe_step:
            return False
        return len(self._probed) < (self.virtual_workers if self._is_local else 1)

    @contextmanager
    def probing(self, worker: int | None = None, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Backward passes inside give the worker's fresh direction, at x.

        Args:
            worker: the virtual worker; global scope has one direction for all.
            model: a DistributedDataParallel module, to save the averaging that local scope has no use for.

        Gradients already in `.grad` are kept aside and put back, and so is the random state, so that the pass at y meets
        the same dropout masks (with `batch: independent` the masks are independent too).
        """
        worker = self._select(worker)
        key = self._key(worker)
        params = self._params()
        self._check_engine()
        self._to_rest()
        self._capture.attach(params)
        seen, squares = self._capture.seen, self._capture.pass_squares
        kept = [p.grad for p in params]
        for p in params:
            p.grad = None
        self._capture.pass_squares = None
        direction, filled = self._buffers(self._directions, key), set[int]()
        self._capture.into(direction if self._is_local else None, filled, self._unscale(), self._dtype)
        self._probing = True
        try:
            with self._random_state_kept(), self._unaveraged(model):
                yield
            if not self._is_local:
                self._take_gradients(direction, filled, 1 / self._grad_scale())
            self._drop_unfilled(direction, filled)
            self._probed.add(key)
            self._pending_probe = True
        except BaseException:
            self._directions.pop(key, None)
            raise
        finally:
            self._probing = False
            self._capture.into(None, set(), 1.0, None)
            self._capture.seen, self._capture.pass_squares = seen, squares
            for p, grad in zip(params, kept, strict=True):
                p.grad = grad

    @torch.no_grad()
    def train(self, worker: int | None = None) -> None:
        """Move the parameters from x to the worker's y, before its forward pass; a second call changes nothing.

        Raises:
            RuntimeError: if the step needs a fresh direction and no `probing` came before.
            ValueError: for a worker outside range(virtual_workers).
        """
        self._notice_abandoned_step()
        worker = self._select(worker)
        key = self._key(worker)
        self._pending_probe = False
        self._observed = False
        if self._at is None and hasattr(self.base, "train"):
            self.base.train()
        if self.config.direction == "none" and not self.collect_statistics:
            return
        self._check_engine()
        self._capture.attach(self._params())
        if self.collect_statistics and self._capture.pass_squares is None:
            self._capture.pass_squares = []
        self._capture.start_pass()
        self._sizes.follow(self.param_groups)
        if self._captures_locally:
            filled = self._filled.setdefault(key, set())
            self._capture.into(self._buffers(self._captured, key), filled, self._unscale(), self._dtype)
        if not self.config.is_active(self.step_count) or self._at == key:
            return
        if self._is_probe_step and key not in self._probed:
            raise RuntimeError(
                f"direction {self.config.direction!r} needs a gradient at x first: "
                "`if optimizer.wants_probe: with optimizer.probing(): loss.backward()` before optimizer.train()."
            )
        self._move(key)

    def rest(self) -> None:
        """Put x back; within the step, `train` finds the same y again."""
        self._to_rest()

    def eval(self) -> None:
        """Put x back, and put a base optimizer that has modes into its evaluation mode."""
        self._to_rest()
        if hasattr(self.base, "eval"):
            self.base.eval()

    @torch.no_grad()
    def observe(self) -> None:
        """Look at the averaged gradient after a step's last backward pass and before it is clipped.

        Statistics and the curvature of global scope want it whole; without this call `step` takes it as it finds it.
        """
        self._observe(1 / self._grad_scale())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Put x back, then let the base optimizer step with the gradients.

        A gradient that is not finite leaves x and the base optimizer's state as they are, and drops past directions.

        Args:
            closure: for loops that are written with one; it is evaluated at y, and at x before where the step probes.

        Returns:
            The closure's loss, or None.
        """
        loss = self._evaluate(closure) if closure is not None else None
        self._to_rest()
        if self.config.direction != "none" or self.collect_statistics:
            if self.config.direction != "none" and not self._gradients_are_finite():
                self.discard()
                return loss
            self._observe(1.0)
        self._keep_x_for_length()
        if hasattr(self.base, "train"):
            self.base.train()
        self.base.step()
        self._look_back()
        self.step_count += 1
        self.reset_step()
        return loss

    def discard(self) -> None:
        """Give up the step in progress: x is put back, past directions are dropped, and the skip is counted."""
        self.skipped_steps += 1
        logger.warning(
            "step %d was skipped (overflow, or a gradient that is not finite); %d skipped so far",
            self.step_count,
            self.skipped_steps,
        )
        # Within a forward and backward pass the parameters must not move: train() does it.
        self._directions.clear()
        self.reset_step()

    def reset_step(self) -> None:
        """Forget what the step in progress has gathered (probes, captured gradients), and nothing else."""
        if self.collect_statistics and self._seen_statistics:
            self.statistics = self._summary()
        self._capture.forget()
        for filled in self._filled.values():
            filled.clear()
        self._probed.clear()
        self._pending_probe = False
        self._worker = 0
        self._lengths = {}
        self._seen_statistics = {}
        self._observed = False
        if self._at is not None:
            self._at = -1

    # The move

    def _move(self, key: int) -> None:
        direction = self._direction(key)
        moved = set(self._moved)
        self._to_rest()
        params = self._params()
        indices = [i for i, d in enumerate(direction) if d is not None]
        if not indices:
            return
        self._keep_x([i for i in indices if i not in moved])
        self._moved, self._at = indices, key
        scaled: dict[int, Tensor] = dict(
            zip(indices, scale_direction(self.config.scaling, [direction[i] for i in indices], [params[i] for i in indices]))  # type: ignore[misc]
        )
        steps = self._steps(key, scaled)
        for start, stop, step in steps:
            group = [i for i in range(start, stop) if i in scaled]
            if group:
                number = self._worker_number(key)
                displace_(
                    [params[i] for i in group],
                    [scaled[i] for i in group],
                    step,
                    lambda j, group=group: ("rounding", self.config.seed, self.step_count, number, group[j]),
                )
        if self.collect_statistics:
            self._note("displacement_norm", total_norm([self._x[i].sub(params[i]) for i in indices]))
            self._note("step_size", torch.as_tensor(steps[0][2]).abs())

    def _steps(self, key: int, scaled: dict[int, Tensor]) -> list[tuple[int, int, float | Tensor]]:
        """(first parameter, one past the last, η) of each group, after the cap; keeps ‖x − y‖ where it is needed."""
        steps: list[tuple[int, int, float | Tensor]] = []
        start = 0
        for index, group in enumerate(self.param_groups):
            stop = start + len(group["params"])
            steps.append((start, stop, self._sizes.of_group(index, group, key)))
            start = stop
        cap = self.config.max_displacement
        if (cap is None or self._last_length is None) and not self._measures:
            return steps
        lengths = [total_norm([scaled[i] for i in range(a, b) if i in scaled]) * abs(step) for a, b, step in steps]
        length = total_norm([n.to(lengths[0]) for n in lengths])
        if cap is not None and self._last_length is not None:
            factor = (cap * self._last_length.to(length) / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1)
            steps = [(a, b, step * factor) for a, b, step in steps]
            length = length * factor
        self._lengths[key] = length
        return steps

    def _direction(self, key: int) -> Buffers:
        params = self._params()
        if self.config.is_noise:
            drawn = iter(
                noise(
                    self.config.direction,
                    [p for p in params if p.requires_grad],
                    seed=self.config.seed,
                    step=self.step_count,
                    worker=self._worker_number(key),
                )
            )
            return [next(drawn) if p.requires_grad else None for p in params]
        if key not in self._directions and self._cold_after_load and self.step_count > 0:
            logger.warning("the directions of this worker were not in the checkpoint: the first step after it does not extrapolate")
        self._cold_after_load = False
        return self._directions.get(key, [None] * len(params))

    def _keep_x(self, indices: list[int]) -> None:
        params = self._params()
        for i in indices:
            if i not in self._x or self._x[i].shape != params[i].shape or self._x[i].dtype != params[i].dtype:
                self._x[i] = torch.empty_like(params[i])
        copy_([self._x[i] for i in indices], [params[i] for i in indices])

    def _to_rest(self) -> None:
        if self._moved:
            params = self._params()
            with torch.no_grad():
                copy_([params[i] for i in self._moved], [self._x[i] for i in self._moved])
        self._moved, self._at = [], None

    # After the pass at y

    def _observe(self, unscale: float) -> None:
        """Look at the averaged gradient once a step: statistics, and the curvature of global scope."""
        if self._observed:
            return
        self._observed = True
        params = self._params()
        if self._measures and not self._is_local and 0 in self._probed:
            self._measure(0, [None if p.grad is None else p.grad * unscale for p in params])
        if not self.collect_statistics:
            return
        grads = [p.grad for p in params if p.grad is not None]
        norm = total_norm(grads) * unscale
        self._seen_statistics["gradient_square"] = [norm.square()]
        passes = self._capture.pass_squares or []
        if passes:
            # Each pass's loss was divided by their number.
            factor = (len(passes) / self._grad_scale()) ** 2
            self._seen_statistics["pass_square"] = [square * factor for square in passes]
            self._seen_statistics["passes"] = [torch.tensor(float(len(passes)))]
        self._seen_statistics["direction_cosine"] = [
            self._cosine(direction, params) for direction in self._directions_at_hand()
        ]

    def _directions_at_hand(self) -> list[Buffers]:
        """The directions of this step, or, from the past, the local gradients that will be the next one's."""
        if self.config.direction == "past_gradient" and self._is_local:
            return [
                [buffer if i in self._filled[key] else None for i, buffer in enumerate(captured)]
                for key, captured in self._captured.items()
                if self._filled[key]
            ]
        return [d for d in self._directions.values() if any(t is not None for t in d)]

    @staticmethod
    def _cosine(direction: Buffers, params: list[Tensor]) -> Tensor:
        pairs = [(d.to(p.grad), p.grad) for d, p in zip(direction, params) if d is not None and p.grad is not None]
        if not pairs:
            return torch.zeros(())
        dot = torch.stack([torch.sum(d * g).to(pairs[0][0].device) for d, g in pairs]).sum()
        norms = total_norm([d for d, _ in pairs]) * total_norm([g for _, g in pairs])
        return dot / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def _measure(self, key: int, at_y: Buffers) -> None:
        """Smooth ‖g(y) − g(x)‖ / ‖y − x‖ into the curvature of a worker that has just probed."""
        if key not in self._lengths:
            return
        at_x = self._directions.get(key, [])
        change = [a.sub(b.to(a)) for a, b in zip(at_y, at_x) if a is not None and b is not None]
        if change:
            self._sizes.measure(key, total_norm(change), self._lengths[key])

    def _keep_x_for_length(self) -> None:
        if self._needs_last_update or self.config.max_displacement is not None:
            self._keep_x([i for i, p in enumerate(self._params()) if p.requires_grad])

    def _look_back(self) -> None:
        """Turn what this step saw into what the next one looks along."""
        params = self._params()
        if self._measures and self._is_local:
            for key in self._probed:
                self._measure(key, self._filled_only(key))
        if self.config.max_displacement is not None:
            self._last_length = total_norm([self._x[i].sub(params[i]) for i in self._x])
        if self.config.is_fresh:
            self._directions.clear()
        elif self._needs_last_update:
            self._take_update(params)
        elif self.config.direction == "past_gradient":
            self._take_past_gradients()

    def _take_past_gradients(self) -> None:
        if not self.config.is_active(self.step_count + 1):
            self._directions.clear()
        elif not self._is_local:
            direction, filled = self._buffers(self._directions, 0), set[int]()
            self._take_gradients(direction, filled, 1.0)
            self._drop_unfilled(direction, filled)
        else:
            for key, filled in self._filled.items():
                if not filled:
                    continue
                spent = self._directions.get(key, [])
                self._directions[key] = self._filled_only(key)
                self._captured[key] = spent

    def _take_update(self, params: list[Tensor]) -> None:
        """d = (x_{t−1} − x_t) / lr, the base optimizer's own direction."""
        if not self.config.is_active(self.step_count + 1):
            self._directions.clear()
            return
        direction, filled = self._buffers(self._directions, 0), set[int]()
        start = 0
        for group in self.param_groups:
            rate = self._sizes.learning_rate(group)
            for i in range(start, start + len(group["params"])):
                if i in self._x and params[i].requires_grad and params[i].grad is not None and rate > 0:
                    wide = self._x[i].to(torch.promote_types(params[i].dtype, torch.float32))
                    self._store(direction, i, wide.sub(params[i]).div_(rate))
                    filled.add(i)
            start += len(group["params"])
        self._drop_unfilled(direction, filled)

    def _take_gradients(self, direction: Buffers, filled: set[int], unscale: float) -> None:
        for i, p in enumerate(self._params()):
            if p.grad is not None:
                self._store(direction, i, p.grad if unscale == 1 else p.grad * unscale)
                filled.add(i)

    def _store(self, buffers: Buffers, index: int, value: Tensor) -> None:
        buffer = buffers[index]
        if buffer is None or buffer.shape != value.shape:
            buffers[index] = value.detach().to(self._dtype or value.dtype, copy=True)
        else:
            buffer.copy_(value)

    def _gradients_are_finite(self) -> bool:
        grads = [p.grad for p in self._params() if p.grad is not None]
        captured = [b for key in self._filled for b in self._filled_only(key) if b is not None]
        return bool(torch.isfinite(total_norm(grads))) and bool(torch.isfinite(total_norm(captured)))

    def _filled_only(self, key: int) -> Buffers:
        return [b if i in self._filled[key] else None for i, b in enumerate(self._captured[key])]

    # What the configuration asks of this step

    @property
    def _is_local(self) -> bool:
        return self.config.scope == "local" and self.config.direction != "past_update"

    @property
    def _is_probe_step(self) -> bool:
        """Whether this step looks along a fresh gradient."""
        if not self.config.is_active(self.step_count):
            return False
        due = self.step_count % self.config.probe_every == 0
        return self.config.is_fresh or (self.config.step_size == "auto" and self.config.is_past and due)

    @property
    def _measures(self) -> bool:
        return self.config.step_size == "auto" and self._is_probe_step

    @property
    def _captures_locally(self) -> bool:
        past = self.config.direction == "past_gradient" and self.config.is_active(self.step_count + 1)
        return self._is_local and (past or self._measures)

    @property
    def _needs_last_update(self) -> bool:
        return self.config.direction == "past_update"

    def _key(self, worker: int) -> int:
        """Whose direction a worker uses: its own, or the one of all."""
        return worker if self._is_local else 0

    def _worker_number(self, key: int) -> int:
        """The number of this process's worker among those of all processes; 0 for all in global scope."""
        rank, world_size = _process()
        return key * world_size + rank if self._is_local else 0

    def _select(self, worker: int | None) -> int:
        if worker is not None:
            if not 0 <= worker < self.virtual_workers:
                raise ValueError(f"worker is {worker}; allowed: 0 to {self.virtual_workers - 1} (virtual_workers).")
            self._worker = worker
        return self._worker

    # Small things

    @property
    def _dtype(self) -> torch.dtype | None:
        return getattr(torch, self.config.direction_dtype) if self.config.direction_dtype else None

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _buffers(self, store: dict[int, Buffers], key: int) -> Buffers:
        buffers = store.setdefault(key, [])
        buffers += [None] * (len(self._params()) - len(buffers))
        return buffers

    @staticmethod
    def _drop_unfilled(buffers: Buffers, filled: set[int]) -> None:
        for i in range(len(buffers)):
            if i not in filled:
                buffers[i] = None

    def _grad_scale(self) -> float:
        return float(self.grad_scaler.get_scale()) if self.grad_scaler is not None and self.grad_scaler.is_enabled() else 1.0

    def _unscale(self) -> float:
        """The factor that turns a worker's gradient of the scaled loss into that of its mean loss."""
        return 1 / (self.loss_scale * self._grad_scale())

    def _notice_abandoned_step(self) -> None:
        """A step was skipped if its gradients are gone and no step was taken: a GradScaler's overflow looks like this."""
        if self._capture.seen and all(p.grad is None for p in self._params()):
            self.discard()

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            if self.wants_probe:
                with self.probing():
                    closure()
            self.train()
            return closure()

    def _random_state_kept(self) -> Any:
        if self.config.batch == "independent":
            return nullcontext()
        devices = {p.device for p in self._params() if p.device.type not in ("cpu", "meta")}
        if not devices:
            return torch.random.fork_rng(devices=[])
        kind = next(iter(devices)).type
        return torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices), device_type=kind)

    def _unaveraged(self, model: torch.nn.Module | None) -> Any:
        return model.no_sync() if model is not None and self._is_local and hasattr(model, "no_sync") else nullcontext()  # type: ignore[operator]

    def _check_engine(self) -> None:
        if self._is_local and self.config.direction != "none" and not self.config.is_noise:
            for p in self._params():
                if hasattr(p, "device_mesh") or type(p).__name__ == "FlatParameter":
                    raise ValueError(
                        "scope is 'local', but the parameters are sharded (FSDP or ZeRO-3), so that no worker has its own y; "
                        "allowed: scope 'global' (extragradient, optimistic, past-update), DDP, or ZeRO-0 to 2."
                    )

    def _note(self, name: str, value: Tensor) -> None:
        self._seen_statistics.setdefault(name, []).append(value)

    def _summary(self) -> dict[str, float]:
        return {name: float(sum(float(v) for v in values) / len(values)) for name, values in self._seen_statistics.items() if values}

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, and under `extrap` what this wrapper adds: tensors and numbers only.

        Directions that differ between processes are not in it: each process saves its own `local_state_dict`.
        """
        self._to_rest()
        return {**self.base.state_dict(), "extrap": checkpoint.shared_state(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; that of the base optimizer alone is taken too, and directions start cold."""
        self._to_rest()
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
        self._to_rest()
        within_step = set(vars(Extrapolated._blank()))
        return {k: v for k, v in self.__dict__.items() if k not in within_step and k != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
        Optimizer.__setstate__(self, {})

    @staticmethod
    def _blank() -> Extrapolated:
        blank = object.__new__(Extrapolated)
        blank._start()
        return blank

    def __repr__(self) -> str:
        return f"Extrapolated({self.base!r},\n{self.config!r}, virtual_workers={self.virtual_workers})"


def _process() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
