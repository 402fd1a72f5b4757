"""Presets and overrides through the arguments, from Python, YAML and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from hf_extrap import ExtrapConfig, ExtrapSeq2SeqTrainingArguments, ExtrapTrainingArguments
from tests.support.tiny_trainer import arguments

STOCK = "adamw_torch_fused"
LARS = {"base_optimizer": "lars", "optim": STOCK}


def parse(words: str, folder: Path) -> ExtrapTrainingArguments:
    parser = HfArgumentParser(ExtrapTrainingArguments)
    return parser.parse_args_into_dataclasses(["--output_dir", str(folder), "--use_cpu", "true", *words.split()])[0]


def test_a_preset_and_its_overrides_become_a_configuration(tmp_path: Path) -> None:
    words = "--extrap sam --extrap_step_size 0.2 --extrap_scope global --extrap_ascent 0 --extrap_end_step 7 --seed 5"
    expected = ExtrapConfig.preset("sam", step_size=0.2, scope="global", ascent=False, end_step=7, seed=5)
    assert parse(words, tmp_path).extrap_config() == expected
    config = parse("--extrap extrap-past --extrap_step_size auto --extrap_probe_every 4", tmp_path).extrap_config()
    assert (config.step_size, config.step_ratio, config.probe_every) == ("auto", None, 4)
    assert parse("--extrap extrap --extrap_step_size 5e-3", tmp_path).extrap_config().step_size == 5e-3
    assert arguments(tmp_path, extrap_virtual_workers=3).gradient_accumulation_steps == 3
    seq2seq = arguments(tmp_path, kind=ExtrapSeq2SeqTrainingArguments, extrap_virtual_workers=2)
    assert (seq2seq.gradient_accumulation_steps, seq2seq.predict_with_generate) == (2, False)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"extrap": "extrapolate"}, "extrap preset is 'extrapolate'; allowed: none, extrap, extrap-past"),
        ({"extrap": "extrap", "extrap_scope": "both"}, "scope is 'both'; allowed: local, global"),
        ({"extrap": "extrap", "extrap_batch_fraction": 0.0}, r"batch_fraction is 0.0; allowed: a number in \(0, 1\]"),
        ({"extrap": "extrap", "extrap_step_size": "1", "extrap_step_ratio": 1.0}, "both given; allowed: exactly one"),
        ({"extrap": "extrap", "extrap_step_size": "big"}, "extrap_step_size is 'big'; allowed: a number, or 'auto'"),
        ({"extrap_step_ratio": 1.0}, "need a direction"),
        ({"extrap_virtual_workers": 0}, "extrap_virtual_workers is 0"),
        ({"extrap_virtual_workers": 2, "gradient_accumulation_steps": 3}, "gradient_accumulation_steps is 3"),
        ({"lr_scaling": "linear"}, "base_batch_size is missing"),
        ({"lr_scaling": "cubic", "base_batch_size": 1}, "lr_scaling is 'cubic'; allowed: none, linear, sqrt"),
        ({"lr_milestones": [0.7, 0.5]}, "increasing shares"),
        ({"warmup_epochs": 1, "warmup_steps": 10}, "warmup_epochs is 1"),
        ({"sgd_momentum": 0.9, "optim": "adamw_torch"}, "need optim 'sgd'"),
        ({"recalibrate_batch_norm": -1}, "recalibrate_batch_norm is -1"),
        ({"sharpness_batches": -1}, "sharpness_batches is -1; allowed"),
        ({"local_steps": 0}, "local_steps is 0; allowed: a whole number >= 1."),
        ({"local_steps": 2, "local_sgd_start": 1.5}, "local_sgd_start is 1.5; allowed: a share"),
        ({"base_optimizer": "larz", "optim": STOCK}, "base_optimizer is 'larz'; allowed: lars"),
        ({**LARS, "optim_args": "momentun=0.9"}, "'momentun', which 'lars' does not take; allowed: mom"),
        ({**LARS, "optim_args": "0.9"}, "optim_args is '0.9'; allowed: name=value"),
        ({**LARS, "optim": "sgd"}, "allowed: one of them"),
    ],
)
def test_bad_fields_are_refused_in_one_sentence(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        arguments(tmp_path, **fields)
    assert "\n" not in str(caught.value)
