"""A checkpoint of another model is refused before anything is loaded from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from hf_extrap.training.checkpoints import check_checkpoint_matches


def gpt2(width: int = 8, layers: int = 1) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=4, n_embd=width, n_layer=layers, n_head=1))


@pytest.mark.parametrize("shard", ["5GB", "2KB"])
def test_its_own_checkpoint_is_accepted_whole_or_in_shards(tmp_path: Path, shard: str) -> None:
    gpt2().save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "2KB")
    check_checkpoint_matches(tmp_path, gpt2())


def test_another_shape_is_named(tmp_path: Path) -> None:
    gpt2(width=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of another model: transformer\.\S+ has shape \[48\] there and \[24\] here"):
        check_checkpoint_matches(tmp_path, gpt2())


def test_missing_and_surplus_weights_are_named(tmp_path: Path) -> None:
    gpt2(layers=2).save_pretrained(tmp_path / "two")
    gpt2(layers=1).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=r"this one has no weight 'transformer\.h\.1\."):
        check_checkpoint_matches(tmp_path / "two", gpt2(layers=1))
    with pytest.raises(ValueError, match=r"it has no weight 'transformer\.h\.1\."):
        check_checkpoint_matches(tmp_path / "one", gpt2(layers=2))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_checkpoint_matches(tmp_path / "none", gpt2())
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        check_checkpoint_matches(tmp_path, gpt2())
    (tmp_path / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        check_checkpoint_matches(tmp_path, gpt2())
