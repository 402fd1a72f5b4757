"""Bad numbers, wherever and in whatever order they come, change nothing: the run is that of the good steps alone."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.faults import Fault
from tests.support.plain_loop import (
    AUTO_AND_CAPPED,
    BASES,
    PRESETS,
    identical,
    make_batch,
    make_model,
    take_passes,
    values,
)
from tests.support.soak import cases

SCHEMES = {
    **{preset: ExtrapConfig.preset(preset) for preset in PRESETS},
    **AUTO_AND_CAPPED,
    "window": ExtrapConfig.preset("extrap-past", start_step=1, end_step=4),
    "offloaded": ExtrapConfig.preset("extrap-past", direction_device="cpu"),
    "copied": ExtrapConfig.preset("extrap", swap=False),
}


FAULTS = st.builds(
    Fault,
    st.integers(0, 1),
    st.integers(0, 1),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)


class Replicas:
    """Two models whose gradients are averaged as by DDP, each with two virtual workers."""

    def __init__(self, config: ExtrapConfig, base: str) -> None:
        self.models = [make_model() for _ in range(2)]
        self.optimizers = [
            Extrapolated(BASES[base](list(model.parameters())), config, virtual_workers=2) for model in self.models
        ]

    def params(self, replica: int = 0) -> list[Tensor]:
        return list(self.models[replica].parameters())

    def average(self) -> None:
        for p, q in zip(self.params(0), self.params(1), strict=True):
            if p.grad is not None and q.grad is not None:
                mean = (p.grad + q.grad) / 2
                p.grad, q.grad = mean, mean.clone()

    def step(self, number: int, fault: Fault | None) -> None:
        """The step `number` of the run without faults, once more with one if `fault` is given."""

        def backward(replica: int, worker: int, at_x: bool) -> None:
            model = self.models[replica]
            inputs, labels = make_batch(number, 2 * worker + replica)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            if fault is not None and (fault.replica, fault.worker, fault.at_x) == (replica, worker, at_x):
                loss = fault.spoil(loss, model)
            (loss / 2).backward()

        if not self.optimizers[0].config.is_local and self.optimizers[0].wants_probe:
            with ExitStack() as stack:
                for replica, optimizer in enumerate(self.optimizers):
                    stack.enter_context(optimizer.probing())
                    for worker in range(2):
                        backward(replica, worker, True)
                self.average()
        for replica, optimizer in enumerate(self.optimizers):
            take_passes(
                optimizer, lambda worker, _, probe, replica=replica: backward(replica, worker, probe is not None)
            )
            optimizer.restore()
        self.average()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def states(optimizer: Extrapolated) -> list[Tensor]:
    return [v.clone() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


@cases(40, 4_000)
@given(
    st.sampled_from(sorted(SCHEMES)),
    st.sampled_from(sorted(BASES)),
    st.lists(st.none() | FAULTS, min_size=1, max_size=4),
)
def test_faults_are_as_if_they_had_not_been(scheme: str, base: str, faults: list[Fault | None]) -> None:
    """Replicas stay the same; x, and the optimizer's state, are those of the good steps, with directions dropped."""
    config = SCHEMES[scheme]
    run, clean = Replicas(config, base), Replicas(config, base)
    number = 0
    for fault in [*faults, None, None]:
        probes = run.optimizers[0].wants_probe
        # A share of the last step is no step before the first one.
        moves = probes and not (config.scales_by_step and number == 0)
        is_bad = fault is not None and (moves or not fault.at_x)
        x, state = values(run.params()), states(run.optimizers[0])
        run.step(number, fault)
        assert identical(run.params(0), run.params(1))
        if is_bad:
            assert identical(x, run.params()) and identical(state, states(run.optimizers[0]))
            for optimizer in clean.optimizers:
                optimizer.discard()
        else:
            clean.step(number, None)
            number += 1
        for one, other in zip(run.optimizers, clean.optimizers, strict=True):
            counts = (one.step_count, one.skipped_steps, one.skipped_in_a_row)
            assert counts == (other.step_count, other.skipped_steps, other.skipped_in_a_row)
        assert identical(run.params(), clean.params())
        assert identical(states(run.optimizers[0]), states(clean.optimizers[0]))
    assert run.optimizers[0].step_count == number >= 2


@pytest.mark.parametrize("scheme", ["extrap", "extragradient", "gaussian", "sam"])
def test_a_scheme_without_a_past_takes_the_good_steps_alone(scheme: str) -> None:
    """It has no direction to drop: the run is that of a loop that leaves the bad steps out."""
    run, clean = Replicas(SCHEMES[scheme], "sgd"), Replicas(SCHEMES[scheme], "sgd")
    bad = Fault(1, 0, float("nan"), in_loss=False, at_x=False)
    for number, fault in ((0, None), (1, bad), (1, bad), (1, None), (2, bad), (2, None)):
        run.step(number, fault)
    for number in range(3):
        clean.step(number, None)
    assert identical(run.params(), clean.params())
    assert run.optimizers[0].skipped_steps == 3 and run.optimizers[0].skipped_in_a_row == 0


@cases(30, 1_000)
@given(st.sampled_from(sorted(SCHEMES)), st.integers(90, 127), st.sampled_from(["model", "optimizer"]))
@example("extrap", 127, "model")
@example("past-update", 127, "optimizer")
def test_an_overflow_storm(scheme: str, exponent: int, clear: str) -> None:
    """A GradScaler halves its scale until gradients are finite, and the run is the one that starts at that scale."""

    def train(exponent: int, steps: int) -> tuple[list[Tensor], Extrapolated, int]:
        model = make_model(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent, backoff_factor=0.25, growth_interval=10**6)
        optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), SCHEMES[scheme], grad_scaler=scaler)
        for group in optimizer.param_groups:
            group["lr"] = 1e-6
        while optimizer.step_count < steps:
            inputs, labels = make_batch(optimizer.step_count, 0, dtype=torch.float32)
            # Small batches of a large sum, so that scaled gradients leave the range of float32.
            loss = lambda: 1e5 * nn.functional.cross_entropy(model(inputs), labels)  # noqa: E731, B023
            x = values(list(model.parameters()))
            take_passes(optimizer, lambda *_: scaler.scale(loss()).backward())  # noqa: B023
            scaler.step(optimizer)
            scaler.update()
            {"model": model, "optimizer": optimizer}[clear].zero_grad()
            optimizer.notice_skip()
            optimizer.restore()
            if optimizer.skipped_in_a_row:
                assert identical(x, list(model.parameters()))
            assert optimizer.skipped_steps < 70
        return values(list(model.parameters())), optimizer, round(torch.log2(torch.tensor(scaler.get_scale())).item())

    x, optimizer, last = train(exponent, 3)
    assert (exponent - last) == 2 * optimizer.skipped_steps
    expected, calm, same = train(last, 3)
    assert calm.skipped_steps == 0 and same == last
    assert identical(x, expected)


def test_a_step_with_an_infinite_direction_is_skipped() -> None:
    """tanh saturates at an infinite y, where all gradients are finite."""
    run = Replicas(ExtrapConfig.preset("extrap", step_ratio=0.5), "sgd")
    x = values(run.params())
    run.step(0, Fault(0, 0, float("inf"), in_loss=False, at_x=True))
    assert run.optimizers[0].skipped_steps == run.optimizers[1].skipped_steps == 1
    assert identical(x, run.params(0)) and identical(x, run.params(1))


def test_warnings_of_a_row(caplog: pytest.LogCaptureFixture) -> None:
    """The 1st, 2nd, 4th, ... step skipped in a row is warned of; a step that is taken ends the row."""
    run = Replicas(SCHEMES["extrap-past"], "sgd")
    bad = Fault(0, 0, float("inf"), in_loss=True, at_x=False)
    for number, fault in enumerate([*[bad] * 20, None, bad]):
        run.step(number, fault)
    told = [record.getMessage() for record in caplog.records]
    numbers = [1, 2, 4, 8, 16]
    reason = "was skipped (overflow, or a gradient that is not finite)"
    assert told[::2] == [
        *(f"step 0 {reason}; {n} in a row, {n} so far" for n in numbers),
        f"step 1 {reason}; 1 in a row, 21 so far",
    ]


def test_a_saved_row_of_skipped_steps_goes_on() -> None:
    run, resumed = Replicas(SCHEMES["extrap-past"], "sgd"), Replicas(SCHEMES["extrap-past"], "sgd")
    for number in range(3):
        run.step(number, Fault(0, 0, float("nan"), in_loss=True, at_x=False))
    resumed.optimizers[0].load_state_dict(run.optimizers[0].state_dict())
    assert resumed.optimizers[0].skipped_in_a_row == 3
