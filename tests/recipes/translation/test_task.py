"""The translation task: data, model, training, evaluation, errors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    EvalPrediction,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import hf_extrap.recipes.translation.task as translation
from hf_extrap.recipes import get_task
from hf_extrap.recipes.task import PreparedTask
from hf_extrap.recipes.translation.sentence_pairs import sentence_pairs
from hf_extrap.recipes.translation.task import TranslationArguments, TranslationTask, encode

TINY = {"vocab_size": 500, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "attention_heads": 2}
TINY |= {"ffn_dim": 64, "max_length": 48, "batch_tokens": 256, "num_beams": 2}


def training_arguments(folder: Path, **fields) -> Seq2SeqTrainingArguments:
    defaults = TranslationTask().training_defaults() | {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return Seq2SeqTrainingArguments(str(folder), **{**defaults, **fields})


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def prepare(tmp_path, cache):
    def make(training: dict | None = None, **fields) -> PreparedTask:
        torch.manual_seed(0)
        arguments = TranslationArguments(
            **{"data_cache_dir": str(cache), "max_train_samples": 600, "max_eval_samples": 30, **TINY, **fields}
        )
        return get_task("translation").prepare(arguments, training_arguments(tmp_path / "out", **(training or {})))

    return make


def trainer_of(prepared: PreparedTask, folder: Path, more: dict | None = None, **fields) -> Seq2SeqTrainer:
    names = ("model", "train_dataset", "eval_dataset", "data_collator", "processing_class")
    parts = {name: getattr(prepared, name) for name in names} | (more or {})
    return Seq2SeqTrainer(args=training_arguments(folder, save_strategy="no", **fields), **parts)


def write_pairs(folder: Path, rows: dict[str, list]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, split in rows.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in split)
    return folder


def pair(english: str, german: str) -> dict:
    return {"translation": {"en": english, "de": german}}


def load(arguments: TranslationArguments) -> datasets.DatasetDict:
    return sentence_pairs(arguments, arguments.source_lang, arguments.target_lang)


def three_splits(rows: list[dict]) -> dict[str, list]:
    return {"train": rows, "validation": rows, "test": rows}


def test_a_few_steps_reduce_the_loss_and_the_facts_are_right(prepare, tmp_path):
    prepared = prepare()
    fields = {"max_steps": 80, "logging_steps": 20, "learning_rate": 1e-2, "warmup_steps": 0}
    metric = {"compute_metrics": prepared.compute_metrics}
    trainer = trainer_of(prepared, tmp_path, metric, **fields, generation_max_length=40)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.85 * losses[0]
    metrics = trainer.evaluate()
    assert 0.0 <= metrics["eval_bleu"] <= 100.0 and metrics["eval_chrf"] > 0.0
    # A uniform guess has a loss of log 500 = 6.2.
    assert metrics["eval_loss"] < 5.0
    labels = sum(len(example["labels"]) for example in prepared.train_dataset.examples)
    assert prepared.tokens_per_epoch == labels
    assert prepared.samples_per_epoch == prepared.facts["train_pairs"] == 600
    assert prepared.batch_size_unit == pytest.approx(labels / len(prepared.train_dataset))
    assert prepared.facts["sacrebleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_metric_model_and_beam_search(prepare):
    prepared = prepare(training={"predict_with_generate": False})
    assert (prepared.metric, prepared.greater_is_better, prepared.compute_metrics) == ("loss", False, None)
    assert (prepare().metric, prepare().greater_is_better) == ("bleu", True)
    model = prepare().model
    assert isinstance(model, MarianMTModel) and model.config.d_model == 32
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding and model.model.decoder.embed_tokens.weight is embedding
    assert not model.model.encoder.embed_positions.weight.requires_grad
    assert embedding.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.generation_config.num_beams == 2 and model.generation_config.max_length == 48
    prepared = prepare()
    batch = prepared.data_collator([prepared.eval_dataset[i] for i in range(4)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    generated = prepared.model.generate(**inputs, num_beams=2, max_length=10)
    assert (generated[:, 0] == prepared.processing_class.bos_token_id).all() and generated.shape[1] <= 10
    perfect = prepared.compute_metrics(EvalPrediction(batch["labels"].numpy(), batch["labels"].numpy()))
    assert perfect["chrf"] == pytest.approx(100.0) and perfect["length_ratio"] == pytest.approx(1.0)


def test_gradients_are_means_over_the_accumulated_batches(prepare, tmp_path):
    prepared, seen = prepare(dropout=0.0), []

    def collate(items):
        seen.append(prepared.data_collator(items))
        return dict(seen[-1])

    state = {name: value.clone() for name, value in prepared.model.state_dict().items()}
    # With a learning rate of 1, a step of SGD is the gradient.
    fields = {"max_steps": 1, "gradient_accumulation_steps": 3, "max_grad_norm": 0, "optim": "sgd", "warmup_steps": 0}
    fields |= {"learning_rate": 1.0, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    trainer_of(prepared, tmp_path, {"data_collator": collate}, **fields).train()
    moved = {name: state[name] - p.detach() for name, p in prepared.model.named_parameters() if p.requires_grad}
    prepared.model.load_state_dict(state)
    prepared.model.zero_grad()
    # The loader may have fetched a batch more.
    for batch in seen[:3]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = prepared.model(**inputs).logits
        (F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1) / 3).backward()
    for name, parameter in prepared.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(moved[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_columns_of_both_forms_become_the_same_rows(tmp_path):
    rows = [("A house. ", "Ein Haus."), ("Two dogs.", " Zwei Hunde.")]
    nested = write_pairs(tmp_path / "nested", three_splits([pair(*row) for row in rows]))
    flat = write_pairs(tmp_path / "flat", three_splits([{"en": en, "de": de} for en, de in rows]))
    for folder in (nested, flat):
        found = load(TranslationArguments(data_dir=str(folder), data_cache_dir=str(tmp_path / "cache")))["test"]
        assert found.to_dict() == {"source": ["A house.", "Two dogs."], "target": ["Ein Haus.", "Zwei Hunde."]}


def test_the_cache_is_used_again_and_depends_on_the_sentences(tmp_path, monkeypatch):
    rows = [pair(f"House {n}", f"Häuser {n}") for n in range(20)]
    folder = write_pairs(tmp_path / "data", three_splits(rows))
    trained = []
    train = translation.train_bpe
    monkeypatch.setattr(translation, "train_bpe", lambda *a, **k: trained.append(1) or train(*a, **k))

    def encoded(**fields):
        arguments = TranslationArguments(
            **{"data_dir": str(folder), "data_cache_dir": str(tmp_path / "cache"), "vocab_size": 300, **fields}
        )
        return encode(load(arguments), arguments)

    first, again = encoded(), encoded()
    assert len(trained) == 1
    assert first[0].get_vocab() == again[0].get_vocab()
    assert first[1]["train"].to_dict() == again[1]["train"].to_dict()
    encoded(max_train_samples=10)
    encoded(vocab_size=310)
    encoded(source_lang="de", target_lang="en")
    assert len(trained) == 4
    assert not list((tmp_path / "cache" / "translation").glob(".*"))


def test_long_training_sentences_are_cut_and_counted_and_references_are_whole(tmp_path):
    long = " ".join(["Häuser"] * 60)
    rows = [pair("A house.", "Ein Haus."), pair(long, long), pair(long, "Kurz.")]
    folder = write_pairs(tmp_path / "data", three_splits(rows))
    arguments = TranslationArguments(
        data_dir=str(folder), data_cache_dir=str(tmp_path / "cache"), vocab_size=270, max_length=20
    )
    tokenizer, encoded, counts = encode(load(arguments), arguments)
    assert counts == {"train_texts_cut": 3, "validation_texts_cut": 2, "test_texts_cut": 2}
    train = encoded["train"]
    assert max(map(len, train["input_ids"])) == max(map(len, train["labels"])) == 20
    assert train["labels"][1][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded["test"]["labels"][1], skip_special_tokens=True) == long


def test_a_saved_model_and_its_tokenizer_are_taken_from_the_folder(prepare, tmp_path):
    first = prepare()
    first.model.save_pretrained(tmp_path / "model")
    first.processing_class.save_pretrained(tmp_path / "model")
    second = prepare(model=str(tmp_path / "model"), num_beams=3, d_model=64)
    assert second.model.config.d_model == 32 and second.model.accepts_loss_kwargs is False
    assert second.model.generation_config.num_beams == 3
    assert second.train_dataset[0] == first.train_dataset[0]
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


@pytest.mark.parametrize("beams", [1, 3])
def test_evaluation_by_length_finds_what_each_sentence_alone_gives(prepare, tmp_path, beams):
    prepared = prepare({"per_device_eval_batch_size": 8})
    trainer = trainer_of(prepared, tmp_path, per_device_eval_batch_size=8)
    with torch.no_grad():
        # Larger weights, so that the untrained model generates a different text for each source.
        for parameter in prepared.model.parameters():
            parameter.mul_(10)
    found = trainer.predict(prepared.eval_dataset, max_length=20, num_beams=beams)
    rows = [example for example in prepared.eval_dataset.items if example["labels"]]
    sources = [len(example["input_ids"]) for example in rows]
    assert len(rows) == 30 and sources == sorted(sources) and sources[0] < sources[-1]

    metrics = prepared.compute_metrics
    batched, references = metrics.texts(found.predictions, found.label_ids)
    alone, own_references = [], []
    for example in rows:
        batch = prepared.data_collator([example])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        generated = prepared.model.generate(**inputs, max_length=20, num_beams=beams)
        texts = metrics.texts(generated.numpy(), batch["labels"].numpy())
        alone += texts[0]
        own_references += texts[1]
    assert batched == alone and references == own_references
    assert len(set(alone)) > 20


def test_bad_data_is_refused(tmp_path):
    good = three_splits([pair("A house.", "Ein Haus.")])
    missing = good | {"train": [pair("A", "B"), pair("C", None)]}
    texts = three_splits([{"text": "A house."}])
    for number, (rows, target, message) in enumerate(
        (
            (good, "fr", "split 'train' has no sentences in 'fr': it has de, en"),
            (missing, "de", "row 1 of split 'train' has no text in 'de'"),
            (texts, "de", "has no sentences in 'en': it has text"),
        )
    ):
        folder = write_pairs(tmp_path / str(number), rows)
        with pytest.raises(ValueError, match=message):
            load(TranslationArguments(data_dir=str(folder), data_cache_dir=str(tmp_path / "cache"), target_lang=target))


def test_unusable_settings_and_models_are_refused(prepare, tmp_path):
    for fields, message in (
        ({"source_lang": "de"}, "`source_lang` and `target_lang` are both 'de'"),
        ({"batch_tokens": 100}, "`batch_tokens` is 100; allowed: at least 128"),
        ({"d_model": 100}, "allowed: multiples of `attention_heads`, 8"),
        ({"dropout": 1.0}, r"`dropout` is 1.0; allowed: \[0, 1\)"),
        ({"num_beams": 0}, "`num_beams` is 0"),
        ({"max_length": 1}, "`max_length` is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TranslationArguments(**fields)
    with pytest.raises(ValueError, match="allowed: 1, as one item is a whole batch"):
        prepare({"per_device_train_batch_size": 8})
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        prepare(model=str(tmp_path / "no-such-model"))
    with pytest.raises(ValueError, match="English .en. and German .de., not 'en' and 'fr'"):
        prepare(target_lang="fr")
    first = prepare()
    config = first.model.config
    config.max_position_embeddings = 4
    MarianMTModel(config).save_pretrained(tmp_path / "short")
    first.processing_class.save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="at most 4, the positions of the model"):
        prepare(model=str(tmp_path / "short"))


def test_multi30k_is_read_whole(shared_data, tmp_path):
    splits = load(TranslationArguments(data_dir=str(shared_data / "multi30k"), data_cache_dir=str(tmp_path / "cache")))
    assert {name: len(split) for name, split in splits.items()} == {"train": 29000, "validation": 1014, "test": 1000}
    assert isinstance(splits, datasets.DatasetDict)
    assert splits["train"][0]["target"] == "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche."
