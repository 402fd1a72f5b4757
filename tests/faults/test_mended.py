"""Faults that random cases have found, each as one plain case."""

from __future__ import annotations

import copy
import enum
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_extrap import ExtrapConfig, Extrapolated, ExtrapTrainingArguments
from tests.support.plain_loop import PRESETS, identical, make_batch, make_model, values
from tests.support.refusals import assert_refusal


@pytest.mark.parametrize("name", [[], {}, None, 3, b"extrap"])
def test_the_name_of_a_preset_is_a_string(name: Any) -> None:
    with pytest.raises(ValueError, match="extrap preset is .*; allowed: none, extrap") as caught:
        ExtrapConfig.preset(name)
    assert_refusal(caught.value)


NO_MAPPINGS: dict[str, list[Any]] = {
    "YAML": ["a: [", "a: *b", "{[]: 1}", "\0", "!!int ''", "- 1", "", "[" * 600, 3, None, b"seed: 1"],
    "JSON": ["{", "[1]", "", "9" * 5000, 3, None],
}


@pytest.mark.parametrize(("language", "text"), [(name, text) for name, texts in NO_MAPPINGS.items() for text in texts])
def test_what_is_no_mapping_is_refused_in_our_words(language: str, text: Any) -> None:
    parse = {"YAML": ExtrapConfig.from_yaml, "JSON": ExtrapConfig.from_json}[language]
    message = f"text of an extrap configuration is .*allowed: a mapping of fields in {language}"
    with pytest.raises(ValueError, match=message) as caught:
        parse(text)
    assert_refusal(caught.value)


class Scope(str, enum.Enum):  # noqa: UP042, since a StrEnum would be written
    LOCAL = "local"


def test_numbers_of_numpy_and_enums_are_written() -> None:
    """Both are what the fields ask for, but YAML can write neither."""
    config = ExtrapConfig(direction="past_gradient", step_size=np.linspace(0, 1, 5)[1], scope=Scope.LOCAL)
    assert type(config.step_size) is float and type(config.scope) is str
    assert ExtrapConfig.from_yaml(config.to_yaml()) == config == ExtrapConfig.from_json(config.to_json())


@pytest.mark.parametrize(
    "wrong",
    [
        {"extrap_virtual_workers": "2"},
        {"extrap_virtual_workers": None},
        {"local_steps": 2.5},
        {"lr_milestones": 0.5},
        {"lr_milestones": ["0.5"]},
        {"base_batch_size": float("inf"), "lr_scaling": "linear"},
        {"lr_milestone_factor": float("nan")},
        {"warmup_epochs": "1"},
        {"sharpness_batches": True},
        {"carry_state": "false"},
        {"extrap_step_size": [1], "extrap": "extrap"},
        {"extrap": []},
    ],
    ids=str,
)
def test_training_arguments_of_another_type_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"{next(iter(wrong)).removeprefix('extrap_step')}.* is .*; allowed: "
    ) as caught:
        ExtrapTrainingArguments(str(tmp_path), use_cpu=True, **wrong)
    assert_refusal(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_without_memory_are_refused(preset: str) -> None:
    base = torch.optim.SGD([nn.Parameter(torch.ones(2, device="meta"))], lr=0.1)
    with pytest.raises(ValueError, match="parameter 0 is on the meta device; allowed: ") as caught:
        Extrapolated(base, ExtrapConfig.preset(preset))
    assert_refusal(caught.value)


@pytest.mark.parametrize("config", [ExtrapConfig(), ExtrapConfig.preset("extrap", step_size=0.0)], ids=["none", "0"])
def test_lbfgs_steps_while_statistics_are_collected(config: ExtrapConfig) -> None:
    def train(collects: bool) -> tuple[torch.Tensor, Extrapolated]:
        p = nn.Parameter(torch.tensor([2.0, -3.0]))
        optimizer = Extrapolated(torch.optim.LBFGS([p], lr=0.5), config)
        optimizer.collect_statistics = collects

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = p.square().square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.train()
            optimizer.step(closure)
        return p.detach(), optimizer

    (expected, _), (end, optimizer) = train(False), train(True)
    assert torch.equal(end, expected) and end.norm() < 1
    assert optimizer.skipped_steps == 0 and optimizer.step_count == 3


def test_statistics_of_complex_parameters() -> None:
    """‖ḡ‖² and ‖Δx‖ over both parts."""
    p = nn.Parameter(torch.tensor([3 + 4j, 0j]))
    optimizer = Extrapolated(torch.optim.SGD([p], lr=0.5), ExtrapConfig.preset("none"))
    optimizer.collect_statistics = True
    optimizer.train()
    (p.abs().square().sum() / 2).backward()
    optimizer.step()
    assert optimizer.statistics["gradient_square"] == pytest.approx(25)
    assert optimizer.statistics["step_length"] == pytest.approx(2.5)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_model_that_is_copied_at_y_before_its_optimizer_holds_x(copied: Any) -> None:
    model = make_model()
    x = values(list(model.parameters()))
    optimizer = Extrapolated(torch.optim.AdamW(model.parameters()), ExtrapConfig.preset("sam"))
    inputs, labels = make_batch(0, 0)
    with optimizer.probing() as backward:
        backward(nn.functional.cross_entropy(model(inputs), labels))
    optimizer.train()
    assert not identical(list(model.parameters()), x)
    other, _ = copied((model, optimizer))
    assert identical(list(other.parameters()), x) and identical(list(model.parameters()), x)


def test_a_step_without_a_pass_at_y_measures_no_curvature() -> None:
    model = make_model()
    optimizer = Extrapolated(
        torch.optim.AdamW(model.parameters()), ExtrapConfig.preset("extragradient", step_size="auto")
    )
    inputs, labels = make_batch(0, 0)
    with optimizer.probing() as backward:
        backward(nn.functional.cross_entropy(model(inputs), labels))
    x = values(list(model.parameters()))
    optimizer.step()
    assert identical(list(model.parameters()), x)
