"""A checkpoint of another model is refused before anything is loaded from it; a whole one is uploaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_extrap import ExtrapTrainerMixin
from hf_extrap.training.checkpoints.folders import MANIFEST_FILE
from hf_extrap.training.checkpoints.matching import check_checkpoint_matches
from tests.support import tiny_trainer


def gpt2(width: int = 8, layers: int = 1) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=4, n_embd=width, n_layer=layers, n_head=1))


@pytest.mark.parametrize("shard", ["5GB", "2KB"])
def test_its_own_checkpoint_is_accepted_whole_or_in_shards(tmp_path: Path, shard: str) -> None:
    gpt2().save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "2KB")
    check_checkpoint_matches(tmp_path, gpt2())


def test_other_models_and_missing_or_damaged_files_are_named(tmp_path: Path) -> None:
    kept = {"wide": gpt2(width=16), "two": gpt2(layers=2), "one": gpt2()}
    for name, model in kept.items():
        model.save_pretrained(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"not tensors at all")
    for name, model, error, message in (
        ("wide", gpt2(), ValueError, r"of another model: transformer\.\S+ has shape \[48\] there and \[24\] here"),
        ("two", gpt2(), ValueError, r"this one has no weight 'transformer\.h\.1\."),
        ("one", gpt2(layers=2), ValueError, r"it has no weight 'transformer\.h\.1\."),
        ("none", gpt2(), FileNotFoundError, "does not exist"),
        ("empty", gpt2(), FileNotFoundError, r"has no model\.safetensors"),
        ("damaged", gpt2(), ValueError, r"model\.safetensors is damaged"),
    ):
        with pytest.raises(error, match=message):
            check_checkpoint_matches(tmp_path / name, model)


def test_a_checkpoint_is_uploaded_from_its_place_and_once(tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []

    class Uploading(Trainer):
        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            seen.append((checkpoint_folder, (Path(checkpoint_folder) / MANIFEST_FILE).is_file()))

    class Both(ExtrapTrainerMixin, Uploading):
        pass

    saving = tiny_trainer.arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer = Both(tiny_trainer.gpt2(), saving, train_dataset=tiny_trainer.Sentences(64))
    # Set later, since the Trainer would look for the Hub.
    trainer.args.push_to_hub = True
    trainer.train()
    assert seen == [(str(tmp_path / f"checkpoint-{step}"), True) for step in (2, 4, 6)]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
