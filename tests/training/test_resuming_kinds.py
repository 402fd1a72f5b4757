"""Checkpoints of every kind that the stock Trainer resumes: adapters, `.bin` files, shards, quantized bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from hf_extrap.training.checkpoints.folders import MANIFEST_FILE
from hf_extrap.training.checkpoints.matching import check_checkpoint_matches
from tests.support.tiny_trainer import gpt2, train, weights

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "extrap_virtual_workers": 2}
ADAM: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.02}


class Int8Linear(nn.Linear):
    """A frozen weight in int8 with one scale, as a quantized base holds it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.scale = nn.Buffer(weight.abs().max() / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) * self.scale)


def lora(rank: int = 2, base: Any = None, targets: Any = ("c_attn", "c_fc"), **options: Any) -> peft.PeftModel:
    model = gpt2(0.1) if base is None else base
    torch.manual_seed(1)
    config = peft.LoraConfig(r=rank, target_modules=list(targets), lora_dropout=0.1, **options)
    return peft.get_peft_model(model, config)


def several() -> peft.PeftModel:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["c_fc"]))
    return model


def two_and_none_is_default() -> peft.PeftModel:
    model = peft.get_peft_model(gpt2(0.1), peft.LoraConfig(r=2, target_modules=["c_fc"]), adapter_name="first")
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["c_fc"]))
    return model


def prompt() -> peft.PeftModel:
    model = gpt2(0.1)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def quantized() -> peft.PeftModel:
    model = gpt2(0.1)
    block = model.transformer.h[0].mlp
    block.c_proj = Int8Linear(block.c_proj.weight.data.T)
    return lora(base=model, targets=["c_proj"])


def as_bin(checkpoint: Path, shards: int = 1) -> None:
    """Rewrite the weights as a `.bin` file or as shards of them, in the place of safetensors."""
    split(checkpoint, shards, "pytorch_model.bin", torch.save)


def split(checkpoint: Path, shards: int, name: str, save: Callable[[dict[str, Tensor], Path], None]) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / MANIFEST_FILE).unlink()
    if shards == 1:
        save(stored, checkpoint / name)
        return
    stem, _, ending = name.partition(".")
    files = {key: f"{stem}-{i % shards + 1:05}-of-{shards:05}.{ending}" for i, key in enumerate(stored)}
    for file in set(files.values()):
        save({key: stored[key] for key in stored if files[key] == file}, checkpoint / file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (checkpoint / f"{name}.index.json").write_text(json.dumps(index))


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[Path], None]]] = {
    "lora": (lora, lambda checkpoint: None),
    "several adapters": (several, lambda checkpoint: None),
    "two adapters, none of them default": (two_and_none_is_default, lambda checkpoint: None),
    "dora": (lambda: lora(use_dora=True), lambda checkpoint: None),
    "prompt tuning": (prompt, lambda checkpoint: None),
    "lora with saved modules": (lambda: lora(modules_to_save=["ln_f"]), lambda checkpoint: None),
    "lora on a quantized base": (quantized, lambda checkpoint: None),
    "bin": (lambda: gpt2(0.1), as_bin),
    "bin in shards": (lambda: gpt2(0.1), lambda checkpoint: as_bin(checkpoint, 3)),
    "safetensors in shards": (
        lambda: gpt2(0.1),
        lambda checkpoint: split(
            checkpoint, 3, "model.safetensors", lambda t, path: save_file(t, path, {"format": "pt"})
        ),
    ),
}


CELLS = {("lora", "none"), ("bin", "none"), ("several adapters", "extrap-past"), ("prompt tuning", "extrap")}


@pytest.mark.parametrize(
    ("kind", "extrap"),
    [
        pytest.param(kind, extrap, marks=() if (kind, extrap) in CELLS else pytest.mark.matrix)
        for kind in KINDS
        for extrap in ("none", "extrap-past", "extrap")
    ],
)
def test_it_resumes_bit_for_bit(kind: str, extrap: str, tmp_path: Path) -> None:
    make, rewrite = KINDS[kind]
    fields = {**SAVING, **ADAM, "extrap": extrap}
    whole = train(tmp_path / "whole", model=make(), **fields)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    rewrite(checkpoint)
    resumed = train(tmp_path / "resumed", model=make(), resume=str(checkpoint), **fields)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]
    assert not torch.equal(weights(whole), torch.cat([p.detach().reshape(-1) for p in make().parameters()]))
    if extrap == "none":
        stock = {**SAVING, **ADAM, "gradient_accumulation_steps": 2}
        del stock["extrap_virtual_workers"]
        again = train(tmp_path / "stock", kind=Trainer, model=make(), resume=str(checkpoint), **stock)
        assert torch.equal(weights(again), weights(whole))


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path / "lora")
    prompt().save_pretrained(tmp_path / "prompt")
    several().save_pretrained(tmp_path / "several")
    check_checkpoint_matches(tmp_path / "lora", lora())
    check_checkpoint_matches(tmp_path / "several", several())
    for name, model, message in (
        ("lora", lora(rank=3), r"lora_A\S* has shape \[2, 16\] there and \[3, 16\] here"),
        ("lora", lora(targets=["c_fc"]), r"this one has no weight '\S*c_attn\S*'"),
        ("lora", lora(use_dora=True), "it has no weight '.*lora_magnitude_vector.*'"),
        ("lora", prompt(), "this one has no weight '.*lora_A.*'"),
        ("prompt", lora(), "this one has no weight 'prompt_embeddings'"),
        ("lora", gpt2(), "it holds adapters, and this one has none"),
        ("several", gpt2(), "it holds adapters, and this one has none"),
    ):
        with pytest.raises(ValueError, match=f"is of another model: .*{message}"):
            check_checkpoint_matches(tmp_path / name, model)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut off"])
def test_a_damaged_or_foreign_bin_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(gpt2().state_dict(), path)
    check_checkpoint_matches(tmp_path, gpt2())
    with pytest.raises(ValueError, match=r"of another model: this one has no weight 'transformer\.wte\.weight'"):
        check_checkpoint_matches(tmp_path, nn.Linear(2, 2))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        check_checkpoint_matches(tmp_path, gpt2())


def test_nothing_in_a_bin_is_executed(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"weight": Command()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="damaged"):
        check_checkpoint_matches(tmp_path, nn.Linear(2, 2))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("resume", ["nowhere", "empty", True])
def test_no_checkpoint_is_transformers_own_error(resume: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = "No valid checkpoint found in output directory" if resume is True else "Can't find a valid checkpoint at"
    for error in (ValueError, FileNotFoundError):
        with pytest.raises(error, match=message):
            train(tmp_path, resume=resume if resume is True else str(tmp_path / resume), checkpoint_integrity="off")
