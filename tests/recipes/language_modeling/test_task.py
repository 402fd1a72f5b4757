"""The language modeling task: data, vocabulary, models, perplexity, errors."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from hf_extrap import ExtrapTrainer, ExtrapTrainingArguments
from hf_extrap.recipes import get_task
from hf_extrap.recipes.data import SPLITS, DataArguments, cached_folder, load_splits
from hf_extrap.recipes.language_modeling import text
from hf_extrap.recipes.language_modeling.task import LanguageModelingArguments, sum_token_losses
from hf_extrap.recipes.language_modeling.text import builtin_text, token_streams, word_level_tokenizer
from hf_extrap.recipes.models import ExtrapLstmForCausalLM
from hf_extrap.recipes.task import PreparedTask

TINY_LSTM = {"hidden_size": 8, "num_hidden_layers": 1, "dropout": 0.0}
TINY_GPT2 = {"model_type": "gpt2", "config_overrides": "n_embd=8,n_layer=1,n_head=2,n_positions=16"}
LINES = ["the cat sat on the mat", "", "the dog sat", "a <unk> cat ran"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of 85 lines in three file formats."""
    path = tmp_path / "corpus"
    path.mkdir()
    (path / "train.txt").write_text("\n".join(LINES * 20) + "\n", encoding="utf-8")
    with gzip.open(path / "validation.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(LINES * 3) + "\n")
    (path / "test.jsonl").write_text('{"text": "the bird sat"}\n' * 4, encoding="utf-8")
    return path


def training_arguments(tmp_path: Path, **fields: Any) -> ExtrapTrainingArguments:
    quiet = {"use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "save_strategy": "no"}
    return ExtrapTrainingArguments(str(tmp_path / "out"), **quiet, **fields)


def evaluate(tmp_path: Path, prepared: PreparedTask, **fields: Any) -> float:
    """The perplexity that the Trainer finds."""
    names = ("eval_dataset", "data_collator", "compute_metrics", "preprocess_logits_for_metrics")
    trainer = ExtrapTrainer(
        prepared.model,
        training_arguments(tmp_path, **{"per_device_eval_batch_size": 3, **fields}),
        **{name: getattr(prepared, name) for name in names},
    )
    first, again = (trainer.evaluate()["eval_perplexity"] for _ in range(2))
    assert first == again
    return first


def prepare(tmp_path: Path, training: dict[str, Any] | None = None, **fields: Any) -> PreparedTask:
    arguments = LanguageModelingArguments(data_cache_dir=str(tmp_path / "cache"), **{"seq_len": 4, **fields})
    batch = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}
    return get_task("language_modeling").prepare(arguments, training_arguments(tmp_path, **batch, **(training or {})))


@pytest.mark.slow
def test_wikitext2_has_its_published_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    arguments = DataArguments(data_dir=str(shared_data / "wikitext-2"), data_cache_dir=str(tmp_path))
    splits = load_splits(arguments, columns=("text",), builtin=builtin_text)
    assert [len(splits[name]) for name in SPLITS] == [36718, 3760, 4358]
    tokenizer = word_level_tokenizer(splits)
    assert len(tokenizer) == 33278
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<unk>", "<eos>"]
    _, ids = token_streams(splits.filter(lambda row, i: i < 100, with_indices=True), tmp_path, tokenizer)
    # One <eos> per row, and one before the first.
    assert (ids["validation"] == 1).sum() == 101


def test_builtin_text_is_deterministic_and_its_splits_are_disjoint() -> None:
    splits = builtin_text()
    rows = {name: splits[name]["text"][:] for name in SPLITS}
    assert rows == {name: builtin_text()[name]["text"][:] for name in SPLITS}
    flat = [row for name in SPLITS for row in rows[name]]
    assert len(set(flat)) > 0.99 * len(flat)
    words = {name: sum(len(row.split()) for row in rows[name]) for name in SPLITS}
    assert words["train"] > 50_000
    assert min(words["validation"], words["test"]) > 3_000
    known = set(" ".join(rows["train"]).split())
    assert all(word in known for name in SPLITS for row in rows[name] for word in row.split())


def test_rows_end_in_eos_and_set_the_unigram_bias(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(tmp_path, data_dir=str(folder), **TINY_LSTM)
    tokenizer = prepared.processing_class
    # <unk> <eos> the cat sat on mat dog a ran bird
    assert len(tokenizer) == prepared.model.config.vocab_size == prepared.facts["vocabulary_size"] == 11
    assert prepared.facts["validation_tokens"] == 3 * (13 + 4)
    first = prepared.eval_dataset[0]["input_ids"]
    assert tokenizer.decode(first).split() == "<eos> the cat sat on".split()
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
    assert prepared.model.config.eos_token_id == tokenizer.eos_token_id == 1
    prepared = prepare(tmp_path, data_dir=str(folder), unigram_bias=True, **TINY_LSTM)
    torch.nn.init.zeros_(prepared.model.lm_head.weight)
    share = prepared.model.lm_head.bias.softmax(0)[prepared.processing_class.convert_tokens_to_ids("the")]
    # "the" occurs 60 times among 340 tokens of train; 11 types get half a count each.
    assert share.item() == pytest.approx(60.5 / (340 + 5.5), rel=1e-5)


def test_the_cache_follows_the_content(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    watched = lambda root, key, build: cached_folder(root, key, lambda at: built.append(key) or build(at))  # noqa: E731
    monkeypatch.setattr(text, "cached_folder", watched)
    for _ in range(2):
        prepare(tmp_path, data_dir=str(folder), **TINY_LSTM)
        assert len(built) == 1
    (folder / "test.jsonl").write_text('{"text": "another bird sat"}\n' * 4, encoding="utf-8")
    prepare(tmp_path, data_dir=str(folder), **TINY_LSTM)
    assert len(set(built)) == 2
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("shape", [TINY_LSTM, TINY_GPT2])
def test_perplexity_equals_a_direct_computation(folder: Path, tmp_path: Path, shape: dict[str, Any]) -> None:
    prepared = prepare(tmp_path, data_dir=str(folder), **shape)
    perplexity = evaluate(tmp_path, prepared)
    model, total, count = prepared.model.eval(), 0.0, 0
    for item in (prepared.eval_dataset[i] for i in range(len(prepared.eval_dataset))):
        with torch.no_grad():
            logits = model(input_ids=item["input_ids"][None]).logits[0]
        total += F.cross_entropy(logits[:-1].double(), item["labels"][1:], reduction="sum").item()
        count += int((item["labels"] != -100).sum())
    assert count == 51
    assert perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    # The chunks stay the same, the batches do not.
    assert evaluate(tmp_path, prepared, per_device_eval_batch_size=5) == pytest.approx(perplexity, rel=1e-6)


def test_only_two_numbers_a_row_are_kept() -> None:
    labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    logits = torch.randn(2, 3, 5)
    sums = sum_token_losses((logits, "cache"), labels)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(sums, torch.stack([losses.sum(1), torch.tensor([2.0, 1.0])], 1))
    torch.testing.assert_close(sum_token_losses(losses, labels), sums)


def test_streams_sample_limits_and_vocabulary_cap(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(tmp_path, {"gradient_accumulation_steps": 3}, data_dir=str(folder), **TINY_LSTM)
    assert prepared.train_dataset.streams == 6
    assert prepared.eval_dataset.streams == 3
    assert prepared.tokens_per_epoch == 4 * prepared.samples_per_epoch == 4 * len(prepared.train_dataset)
    prepared = prepare(tmp_path, data_dir=str(folder), max_train_samples=40, max_eval_samples=4, **TINY_LSTM)
    assert prepared.facts["train_tokens"] == 10 * 17
    assert prepared.facts["validation_tokens"] == 17
    prepared = prepare(tmp_path, data_dir=str(folder), vocab_size=5, **TINY_LSTM)
    assert sorted(prepared.processing_class.get_vocab()) == ["<eos>", "<unk>", "cat", "sat", "the"]
    with pytest.raises(ValueError, match="at least 3"):
        prepare(tmp_path, data_dir=str(folder), vocab_size=2, **TINY_LSTM)


def test_models_from_folders_with_and_without_weights(folder: Path, tmp_path: Path) -> None:
    GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=99).save_pretrained(tmp_path / "shape")
    shapes = {GPT2LMHeadModel: {"model": str(tmp_path / "shape")}, ExtrapLstmForCausalLM: TINY_LSTM}
    for kind, shape in shapes.items():
        fresh = prepare(tmp_path, data_dir=str(folder), **shape)
        assert type(fresh.model) is kind and fresh.model.config.vocab_size == 11
        fresh.model.save_pretrained(tmp_path / kind.__name__)
        fresh.processing_class.save_pretrained(tmp_path / kind.__name__)
        again = prepare(tmp_path, data_dir=str(folder), model=str(tmp_path / kind.__name__))
        assert type(again.model) is kind and again.processing_class.get_vocab() == fresh.processing_class.get_vocab()
        assert np.array_equal(again.train_dataset.ids, fresh.train_dataset.ids)
        scratch = prepare(tmp_path, data_dir=str(folder), model=str(tmp_path / kind.__name__), from_scratch=True)
        weight = fresh.model.get_input_embeddings().weight
        assert torch.equal(again.model.get_input_embeddings().weight, weight)
        assert not torch.equal(scratch.model.get_input_embeddings().weight, weight)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "test.jsonl").unlink(), FileNotFoundError, "no file for split 'test': it needs"),
        (lambda f: (f / "train.txt").write_bytes(b""), ValueError, "train.txt' is empty"),
        (lambda f: (f / "validation.txt.gz").write_bytes(gzip.compress(b"")), ValueError, "validation"),
        (lambda f: (f / "validation.txt.gz").write_bytes(b"\x1f\x8b garbage"), ValueError, "cannot be read as text"),
        (lambda f: (f / "train.txt").write_bytes(b"\xff\xfe\xfa bad\n"), ValueError, "cannot be read as text"),
        (lambda f: (f / "test.jsonl").write_text('{"text": "a"}\n{"te'), ValueError, "cannot be read as json"),
        (lambda f: (f / "test.jsonl").write_text('{"words": "a"}\n'), ValueError, "no column 'text'"),
        (lambda f: (f / "train.jsonl").write_text('{"text": "a"}\n'), ValueError, "keep one of them"),
    ],
)
def test_bad_data_is_refused(folder: Path, tmp_path: Path, spoil: Any, error: type[Exception], message: str) -> None:
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        prepare(tmp_path, data_dir=str(folder), **TINY_LSTM)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"data_dir": "nowhere"}, FileNotFoundError, "is not a folder"),
        ({"dataset": "no/such-corpus"}, FileNotFoundError, "neither 'builtin' nor found on the Hub"),
        ({"model": "nowhere"}, FileNotFoundError, "configuration of model 'nowhere' cannot be loaded"),
        ({"model_type": "gpt-nothing"}, ValueError, "type of AutoConfig"),
        ({"seq_len": 0}, ValueError, "at least 1"),
        ({"max_train_samples": 0}, ValueError, "`max_train_samples` is 0"),
        ({"from_scratch": True}, ValueError, "`model` is null"),
        ({"unigram_bias": True, "model_type": "gpt2"}, ValueError, "only for a new LSTM"),
        ({**TINY_GPT2, "seq_len": 16}, ValueError, "at most 15"),
        ({"seq_len": 100_000}, ValueError, "decrease the batch size"),
    ],
)
def test_bad_fields_are_refused(tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare(tmp_path, **{**TINY_LSTM, **fields})


def test_carried_state_makes_each_stream_one_text(folder: Path, tmp_path: Path) -> None:
    for shape, order, message in ((TINY_GPT2, "sequential", "not recurrent"), (TINY_LSTM, "random", "in order")):
        with pytest.raises(ValueError, match=message):
            carry = {"carry_state": True, "train_sampling_strategy": order}
            prepare(tmp_path, carry, data_dir=str(folder), **shape)
    prepared = prepare(tmp_path, data_dir=str(folder), **TINY_LSTM)
    measured = evaluate(tmp_path, prepared, carry_state=True, train_sampling_strategy="sequential")
    # 51 targets are three whole streams of 17.
    whole = torch.from_numpy(prepared.eval_dataset.ids[np.add.outer(17 * np.arange(3), np.arange(18))].astype(np.int64))
    with torch.no_grad():
        direct = prepared.model.eval()(input_ids=whole, labels=whole).token_losses.mean().exp().item()
    assert measured == pytest.approx(direct, rel=1e-5)
    assert direct != pytest.approx(evaluate(tmp_path, prepared), rel=1e-5)
