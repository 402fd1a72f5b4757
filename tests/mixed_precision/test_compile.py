"""torch.compile: extrapolation does not recompile the model, and compiled passes see y."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.marks import each
from tests.support.measuring import PRESETS, assert_displacements, assert_gradient_at
from tests.support.modes import MODES, train
from tests.support.plain_loop import assert_same_run, make_model, run_plain_loop
from tests.support.plain_loop import sgd as two_rates


class Compiled:
    """Compiles the model, and counts the graphs after every call."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        torch._dynamo.reset()
        counters.clear()
        self.graphs: list[int] = []

    def __call__(self, model: nn.Module) -> Callable[..., Any]:
        compiled = torch.compile(model, backend=self.backend)

        def forward(**inputs: Any) -> Any:
            outputs = compiled(**inputs)
            self.graphs.append(counters["stats"]["unique_graphs"])
            return outputs

        return forward


RUNS = {
    "few": [("float32", "extrap", "aot_eager")],
    "matrix": [
        ("bf16 parameters", "extrap-past", "aot_eager"),
        *(("float32", preset, "aot_eager") for preset in PRESETS if preset != "extrap"),
        ("bf16 autocast", "extrap", "aot_eager"),
        ("fp16 and GradScaler", "extrap-past", "aot_eager"),
        *(("float32", preset, "eager") for preset in ("extrap", "extrap-past")),
    ],
}
GENERATED = {"few": ["extrap", "extrap-past"], "matrix": ["extragradient", "optimistic"]}


@each(RUNS, "mode,preset,backend")
def test_extrapolation_does_not_recompile(mode: str, preset: str, backend: str, which: str) -> None:
    """As many graphs after the first pass as after the last, at every y."""
    compiled = Compiled(backend)
    trained = train(MODES[mode], PRESETS[preset], compiled=compiled)
    assert compiled.graphs[0] >= 1
    assert compiled.graphs == [compiled.graphs[0]] * (8 * (1 + PRESETS[preset].is_fresh))
    assert not counters["recompiles"]
    assert_displacements(trained.steps, PRESETS[preset])
    assert trained.losses[1] < trained.losses[0] - 0.5
    for step in trained.steps:
        for seen in step.passes:
            assert_gradient_at(seen, trained.clean, step.scale, 1e-5 if mode == "float32" else 0.03)


@pytest.mark.parametrize("which", ["few", pytest.param("matrix", marks=pytest.mark.matrix)])
def test_inductor_gives_the_same_x_and_y(which: str) -> None:
    """With generated code: the same x and y as without, for a fresh direction and for one from the past."""
    pytest.importorskip("torch._inductor.cpp_builder").get_cpp_compiler()
    torch._dynamo.reset()
    compiled: Any = torch.compile(make_model(torch.float32))
    start = [p.detach().clone() for p in compiled.parameters()]
    for preset in GENERATED[which]:
        config = ExtrapConfig.preset(preset)
        counters.clear()
        runs = []
        for model in (make_model(torch.float32), compiled):
            with torch.no_grad():
                for p, q in zip(model.parameters(), start, strict=True):
                    p.copy_(q)
            optimizer = Extrapolated(two_rates(list(model.parameters())), config)
            runs.append(run_plain_loop(model, optimizer, config, [0]))
        assert_same_run(*runs, tolerance=1e-5)
        assert counters["stats"]["unique_graphs"] == (1 if preset == GENERATED[which][0] else 0)
