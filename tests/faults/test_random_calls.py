"""Any sequence of calls: between steps the parameters hold x bit for bit, and x is stepped by the base optimizer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import BASES, identical, make_batch, make_model, values
from tests.support.random_schemes import SCHEMES
from tests.support.refusals import refused_or_done
from tests.support.soak import cases

WORKERS = st.integers(0, 1)
OUTSIDE = st.none() | st.integers(0, 2)
"""Workers, of which there are 2."""


class Interrupted(Exception):
    """An exception of the training script."""


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v.clone() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


class Calls(RuleBasedStateMachine):
    """An optimizer, and the base optimizer alone, which takes each step that is taken with the same gradient."""

    @initialize(config=SCHEMES, base=st.sampled_from(sorted(BASES)), workers=st.integers(1, 2), collects=st.booleans())
    def start(self, config: ExtrapConfig, base: str, workers: int, collects: bool) -> None:
        self.model, self.twin = make_model(), make_model()
        self.optimizer = Extrapolated(BASES[base](list(self.model.parameters())), config, virtual_workers=workers)
        self.optimizer.collect_statistics = collects
        self.twin_base = BASES[base](list(self.twin.parameters()))
        self.saved: list[tuple[dict[str, Any], dict[str, Any], list[Tensor], bytes]] = []
        self.number = 0

    def backward(self, probe: Any = None) -> None:
        inputs, labels = make_batch(self.number, 0)
        self.number += 1
        loss = nn.functional.cross_entropy(self.model(inputs), labels)
        (probe or Tensor.backward)(loss / self.optimizer.virtual_workers)

    def assert_at_x(self) -> None:
        assert identical(list(self.model.parameters()), list(self.twin.parameters()))
        assert identical(states(self.optimizer), states(self.twin_base))

    # A training loop, in any order

    @rule(worker=OUTSIDE)
    def train(self, worker: int | None) -> None:
        with refused_or_done():
            self.optimizer.train(worker)

    @rule()
    def pass_back(self) -> None:
        with refused_or_done():
            self.backward()

    @rule(worker=OUTSIDE, fails=st.sampled_from([None, None, "before", "after"]), told=st.booleans())
    def probe(self, worker: int | None, fails: str | None, told: bool) -> None:
        gradients = [p.grad if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        random_state = torch.get_rng_state()
        with refused_or_done():
            try:
                with self.optimizer.probing(worker, self.model if told else None) as backward:
                    self.assert_at_x()
                    if fails == "before":
                        raise Interrupted
                    self.backward(backward)
                    if fails == "after":
                        raise Interrupted
            except Interrupted:
                pass
        assert torch.equal(random_state, torch.get_rng_state())
        for p, g in zip(self.model.parameters(), gradients, strict=True):
            assert (p.grad is None) == (g is None)
            if g is not None:
                torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
        # A worker that does not exist is refused, and changes nothing.
        if worker is None or worker < self.optimizer.virtual_workers:
            self.assert_at_x()

    @rule(workers=st.permutations([0, 1]), accumulation=st.integers(1, 2))
    def whole_step(self, workers: list[int], accumulation: int) -> None:
        """As the documentation says."""
        with refused_or_done():
            for worker in workers[: self.optimizer.virtual_workers]:
                if self.optimizer.wants_probe:
                    with self.optimizer.probing(worker) as backward:
                        self.backward(backward)
                for _ in range(accumulation):
                    self.optimizer.train(worker)
                    self.backward()
        self.step()
        self.optimizer.zero_grad()

    @rule()
    def wants_probe(self) -> None:
        assert isinstance(self.optimizer.wants_probe, bool)

    @rule(keep=st.booleans())
    def restore(self, keep: bool) -> None:
        self.optimizer.restore(keep)
        self.assert_at_x()

    @rule()
    def eval(self) -> None:
        self.optimizer.eval()
        self.assert_at_x()

    @rule(spoiled=st.sampled_from([None, None, None, torch.nan, torch.inf]))
    def step(self, spoiled: float | None = None) -> None:
        params, twins = list(self.model.parameters()), list(self.twin.parameters())
        checks = self.optimizer.config.moves and self.optimizer.config.check_finite
        if spoiled is not None and params[0].grad is not None and checks:
            params[0].grad[0, 0] = spoiled
        for p, q in zip(params, twins, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        taken, skipped = self.optimizer.step_count, self.optimizer.skipped_steps
        self.optimizer.step()
        if self.optimizer.step_count > taken:
            self.twin_base.step()
            assert self.optimizer.skipped_steps == skipped
        else:
            assert self.optimizer.skipped_steps == skipped + 1
            assert not all(q.grad is None or bool(torch.isfinite(q.grad).all()) for q in twins)
        self.assert_at_x()

    @rule(to_none=st.booleans(), of_model=st.booleans())
    def zero_grad(self, to_none: bool, of_model: bool) -> None:
        (self.model if of_model else self.optimizer).zero_grad(to_none)

    @rule()
    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)

    @rule()
    def discard(self) -> None:
        self.optimizer.discard()

    @rule()
    def observe(self) -> None:
        self.optimizer.observe()

    @rule(worker=OUTSIDE, fails=st.booleans())
    def look_ahead(self, worker: int | None, fails: bool) -> None:
        with refused_or_done():
            try:
                with self.optimizer.extrapolating(worker):
                    if fails:
                        raise Interrupted
            except Interrupted:
                pass
        self.assert_at_x()

    @rule(collects=st.booleans())
    def collect(self, collects: bool) -> None:
        self.optimizer.collect_statistics = collects

    @rule(rate=st.sampled_from([0.0, 0.1, 0.5]))
    def change_rate(self, rate: float) -> None:
        for group in (*self.optimizer.param_groups, *self.twin_base.param_groups):
            group["lr"] = rate

    # Saving and copying

    @rule()
    def save(self) -> None:
        state = copy.deepcopy(self.optimizer.state_dict())
        self.assert_at_x()
        bare = {name: value for name, value in state.items() if name != "extrap"}
        self.saved.append((state, copy.deepcopy(bare), values(list(self.model.parameters())), b""))

    @precondition(lambda self: getattr(self, "saved", None))
    @rule(which=st.integers(0, 3), bare=st.booleans())
    def load(self, which: int, bare: bool) -> None:
        state, of_base, x, _ = self.saved[which % len(self.saved)]
        self.optimizer.load_state_dict(copy.deepcopy(of_base if bare else state))
        self.twin_base.load_state_dict(copy.deepcopy(of_base))
        self.assert_at_x()

    @rule()
    def load_local(self) -> None:
        self.optimizer.load_local_state_dict(copy.deepcopy(self.optimizer.local_state_dict()))

    @rule(pickled=st.booleans())
    def copy(self, pickled: bool) -> None:
        """Go on with a copy; the original holds x."""
        before = self.model
        both = (self.model, self.optimizer)
        self.model, self.optimizer = pickle.loads(pickle.dumps(both)) if pickled else copy.deepcopy(both)
        self.assert_at_x()
        assert identical(list(before.parameters()), list(self.twin.parameters()))

    # What must always hold

    @invariant()
    def parameters_hold_x_unless_moved(self) -> None:
        if hasattr(self, "optimizer") and self.optimizer.scheme.displacement.worker is None:
            self.assert_at_x()

    def teardown(self) -> None:
        if hasattr(self, "optimizer"):
            self.optimizer.restore()
            self.assert_at_x()


TestCalls = Calls.TestCase
TestCalls.settings = cases(60, 2_000, stateful_step_count=25)
