"""What a step of the Trainer costs beside the stock one: operations of torch, and waits for the device, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from hf_extrap import PRESETS, ExtrapTrainer
from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM
from tests.support.tiny_trainer import VOCABULARY, train

#: Operations whose result the host waits for: `item`, `bool` and `float` of a tensor, and those of unknown size.
WAITS = {"aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.masked_select", "aten.is_nonzero"}


class Operations(TorchDispatchMode):
    """Notes the operations of torch, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":
            self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def lstm() -> ExtrapLstmForCausalLM:
    """A model that itself waits for nothing, as GPT-2 does for its mask."""
    sizes = {"vocab_size": VOCABULARY, "embedding_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
    return ExtrapLstmForCausalLM(ExtrapLstmConfig(**sizes, dropout=0.0))


class StepByStep(TrainerCallback):
    """Keeps the operations from the beginning of each step to that of the next."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.steps: list[list[str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([])
        self.operations.names = self.steps[-1]


def operations_of(folder: Path, kind: type[Trainer], **fields: Any) -> list[list[str]]:
    """The operations of each step of a training that logs at its end alone, but for the first and the last step."""
    operations = Operations()
    steps = StepByStep(operations)
    options = {"max_steps": 6, "logging_steps": 100, "logging_nan_inf_filter": False, "optim": "sgd"} | fields
    with operations:
        train(folder, kind=kind, model=lstm(), callbacks=[steps], **options)
    assert len(steps.steps) == 6
    return steps.steps[1:-1]


@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2}, {"optim": "adamw_torch"}])
def test_none_runs_the_operations_of_the_stock_trainer_and_no_other(tmp_path: Path, fields: dict[str, Any]) -> None:
    stock = operations_of(tmp_path / "stock", Trainer, **fields)
    ours = operations_of(tmp_path / "ours", ExtrapTrainer, **fields)
    assert ours == stock
    assert all("aten.mm" in step for step in stock)
    # The count does see an extrapolation, and a logged row.
    past = operations_of(tmp_path, ExtrapTrainer, **fields, extrap="extrap-past")
    logged = operations_of(tmp_path, ExtrapTrainer, **fields, logging_steps=1)
    assert all(len(more) > len(step) for found in (past, logged) for more, step in zip(found, ours, strict=True))


OTHERS = [pytest.param(name, marks=pytest.mark.matrix) for name in PRESETS if name not in ("extrap", "extrap-past")]


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.matrix), 2])
@pytest.mark.parametrize("preset", ["extrap", "extrap-past", *OTHERS])
def test_a_step_that_logs_nothing_waits_once_at_most(tmp_path: Path, preset: str, workers: int) -> None:
    def waits(**fields: Any) -> list[int]:
        fields |= {"extrap": preset, "extrap_virtual_workers": workers}
        return [sum(name in WAITS for name in step) for step in operations_of(tmp_path, ExtrapTrainer, **fields)]

    assert waits(extrap_check_finite=False) == [0, 0, 0, 0]
    # Whether the gradient is finite must be known before the step.
    with Operations() as counted:
        assert float(torch.ones(2).sum()) == 2 and bool(torch.ones(()))
    assert sum(name in WAITS for name in counted.names) == 2
    assert waits() == ([0, 0, 0, 0] if preset == "none" else [1, 1, 1, 1])
