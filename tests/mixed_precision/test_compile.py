"""torch.compile: extrapolation does not recompile the model, and compiled passes see y."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hf_extrap import Extrapolated
from tests.support.measuring import PRESETS, assert_displacements, assert_gradient_at
from tests.support.modes import MODES, train
from tests.support.plain_loop import assert_same_run, make_model, run_plain_loop
from tests.support.plain_loop import sgd as two_rates


class Compiled:
    """Compiles the model, and counts the graphs after every call."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.graphs: list[int] = []

    def __call__(self, model: nn.Module) -> Callable[..., Any]:
        compiled = torch.compile(model, backend="aot_eager")

        def forward(**inputs: Any) -> Any:
            outputs = compiled(**inputs)
            self.graphs.append(counters["stats"]["unique_graphs"])
            return outputs

        return forward


MATRIX = [pytest.param("float32", preset, marks=pytest.mark.matrix) for preset in PRESETS if preset != "extrap"]
RUNS = [
    *MATRIX,
    ("float32", "extrap"),
    pytest.param("bf16 autocast", "extrap", marks=pytest.mark.matrix),
    ("bf16 parameters", "extrap-past"),
    pytest.param("fp16 and GradScaler", "extrap-past", marks=pytest.mark.matrix),
]


@pytest.mark.parametrize(("mode", "preset"), RUNS)
def test_extrapolation_does_not_recompile(mode: str, preset: str) -> None:
    """As many graphs after the first pass as after the last, at every y."""
    compiled = Compiled()
    trained = train(MODES[mode], PRESETS[preset], compiled=compiled)
    assert compiled.graphs[0] >= 1
    assert compiled.graphs == [compiled.graphs[0]] * (8 * (1 + PRESETS[preset].is_fresh))
    assert not counters["recompiles"]
    assert_displacements(trained.steps, PRESETS[preset])
    assert trained.losses[1] < trained.losses[0] - 0.5
    for step in trained.steps:
        for seen in step.passes:
            assert_gradient_at(seen, trained.clean, step.scale, 1e-5 if mode == "float32" else 0.03)


def test_inductor_gives_the_same_x_and_y() -> None:
    """With generated code: the same x and y as without, for a fresh direction and for one from the past."""
    pytest.importorskip("torch._inductor.cpp_builder").get_cpp_compiler()
    torch._dynamo.reset()
    compiled: Any = torch.compile(make_model(torch.float32))
    start = [p.detach().clone() for p in compiled.parameters()]
    for preset in ("extrap", "extrap-past"):
        counters.clear()
        runs = []
        for model in (make_model(torch.float32), compiled):
            with torch.no_grad():
                for p, q in zip(model.parameters(), start, strict=True):
                    p.copy_(q)
            optimizer = Extrapolated(two_rates(list(model.parameters())), PRESETS[preset])
            runs.append(run_plain_loop(model, optimizer, PRESETS[preset], [0]))
        assert_same_run(*runs, tolerance=1e-5)
        assert counters["stats"]["unique_graphs"] == (1 if preset == "extrap" else 0)
