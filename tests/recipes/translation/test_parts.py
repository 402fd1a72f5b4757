"""The parts of the translation task: pairs, subwords, batches and BLEU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from sacrebleu.metrics import BLEU, CHRF
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import EvalPrediction

from hf_extrap.recipes.translation.bleu import Bleu, TranslationMetrics, bleu_signature
from hf_extrap.recipes.translation.sentence_pairs import builtin_pairs
from hf_extrap.recipes.translation.subwords import train_bpe
from hf_extrap.recipes.translation.token_batches import (
    FullBatches,
    ReadyBatch,
    TokenBatches,
    UnwrappingCollator,
    lengths,
)

GERMAN = [
    "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    "»Größe«, fragte Jörg: »Äpfel für 3,50 €?«",
    "  zwei  Leerzeichen, \tTabulator und ein 🙂 ",
    "Straße, STRASSE, Fußgängerübergänge",
    "",
    "x",
]


@pytest.fixture(scope="module")
def pairs():
    return builtin_pairs(train=1500, validation=80, test=80)


@pytest.fixture(scope="module")
def tokenizer(pairs):
    texts = [text for row in pairs["train"]["translation"] for text in row.values()]
    return train_bpe(texts, 900, model_max_length=64)


def examples(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    random = np.random.default_rng(seed)
    targets = np.clip(random.poisson(14, size=count), 2, 40)
    sources = np.maximum(2, targets + random.integers(-2, 3, size=count))
    return [
        {"input_ids": [5 + i] * int(s), "labels": [5 + i] * int(t)}
        for i, (s, t) in enumerate(zip(sources, targets, strict=True))
    ]


def test_builtin_pairs_are_fixed_disjoint_translations(pairs):
    def rows(splits):
        return {name: split["translation"][:] for name, split in splits.items()}

    assert rows(pairs) == rows(builtin_pairs(train=1500, validation=80, test=80))
    assert rows(pairs)["train"] != rows(builtin_pairs(train=1500, validation=80, test=80, seed=1))["train"]
    for language in ("en", "de"):
        texts = [row[language] for split in pairs.values() for row in split["translation"]]
        assert len(texts) == len(set(texts)) == 1660
        assert all(text and text == " ".join(text.split()) for text in texts)
    assert pairs["train"].column_names == ["translation"]
    german = {row["en"]: row["de"] for row in pairs["train"]["translation"]}
    spans = {en: de for en, de in german.items() if en.startswith("in ") and en.endswith(" weeks")}
    assert spans and all(de == f"in {en.split()[1]} Wochen" for en, de in spans.items())


def test_bpe_round_trips_any_text_and_learns_words(tokenizer, pairs):
    texts = [row["de"] for row in pairs["test"]["translation"]]
    ids = tokenizer([*GERMAN, *texts])["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [*GERMAN, *texts]
    assert all(row[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in row for row in ids)
    assert len(tokenizer) == 900
    assert sum(map(len, ids[len(GERMAN) :])) < 0.5 * sum(len(text.encode()) for text in texts)
    start = tokenizer("Montag und Montag")["input_ids"]
    assert start[: (len(start) - 2) // 2] == start[-1 - (len(start) - 2) // 2 : -1]
    with pytest.raises(ValueError, match="`vocab_size` is 200; allowed: at least 260"):
        train_bpe(["a"], 200, model_max_length=8)


def test_token_batches_hold_each_example_once_within_the_limit():
    rows = examples(1000)
    batches = TokenBatches(rows, batch_tokens=400, seed=3)
    seen = []
    for index in range(len(batches)):
        sources, targets = lengths(batches[index])
        assert len(sources) * max(sources.max(), targets.max()) <= 400
        seen += [example["labels"][0] for example in batches[index]]
    assert sorted(seen) == [row["labels"][0] for row in rows]
    total = sum(len(row["labels"]) for row in rows)
    assert batches.target_tokens == total and batches.tokens_per_batch == pytest.approx(total / len(batches))
    assert len(batches) < 1.25 * total / 400
    assert batches.padding_share < 0.05
    rows = [{"input_ids": [1], "labels": [1] * n} for n in (4, 4, 2, 1)]
    batches = TokenBatches(rows, batch_tokens=8)
    assert [sorted(len(e["labels"]) for e in batches[i]) for i in range(len(batches))] == [[1, 2], [4, 4]]
    assert batches.padding_share == pytest.approx(1 / 12)
    with pytest.raises(ValueError, match="`batch_tokens` is 8, less than the 9 tokens of the longest example"):
        TokenBatches([{"input_ids": [1] * 9, "labels": [1]}], batch_tokens=8)


def test_a_ready_batch_is_collated_once():
    made: list[int] = []

    def count(rows):
        made.append(len(rows))
        return {"labels": torch.tensor([len(row["labels"]) for row in rows])}

    dataset = TokenBatches(examples(300), 300)
    loader = DataLoader(dataset, batch_size=1, collate_fn=UnwrappingCollator(count))
    epochs = [[batch.pop("labels") for batch in loader] for _ in range(3)]
    assert made == [len(dataset[i]) for i in range(len(dataset))]
    assert all(map(torch.equal, epochs[0], epochs[2]))
    # Another collator has its own cache.
    other = UnwrappingCollator(lambda rows: {"rows": len(rows)})
    assert [other([dataset[i]]) for i in range(len(dataset))] == [{"rows": n} for n in made]


@pytest.mark.parametrize("count", [3, 16, 17, 50, 97])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_gathered_evaluation_rows_count_each_example_once(count, processes):
    rows = examples(count)
    dataset = FullBatches(rows, batch_size=8, world_size=processes)
    gathered: list[int] = []
    shards = [
        list(BatchSamplerShard(BatchSampler(SequentialSampler(dataset), 8, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    assert len({len(shard) for shard in shards}) == 1
    for batches in zip(*shards, strict=True):
        assert {len(batch) for batch in batches} == {8}
        gathered += [index for batch in batches for index in batch]
    kept = [dataset[index]["labels"][0] for index in gathered if dataset[index]["labels"]]
    assert sorted(kept) == [row["labels"][0] for row in rows]
    assert all(dataset[index]["input_ids"] for index in gathered)


def test_seeds_collation_and_too_few_examples():
    with pytest.raises(ValueError, match="1 evaluation examples are too few for 2 batches"):
        FullBatches(examples(1), batch_size=8, world_size=2)
    with pytest.raises(ValueError, match="larger per_device_eval_batch_size"):
        FullBatches(examples(3), batch_size=1, world_size=2)
    rows = examples(300)
    first, same, other = (TokenBatches(rows, 300, seed) for seed in (0, 0, 1))
    assert [first[i] for i in range(len(first))] == [same[i] for i in range(len(same))]
    assert [first[i] for i in range(len(first))] != [other[i] for i in range(len(other))]
    collate = UnwrappingCollator(lambda rows: {"labels": [row["labels"] for row in rows]})
    a, b = ({"labels": [n]} for n in (1, 2))
    assert collate([ReadyBatch([a, b])]) == collate([a, b]) == {"labels": [[1], [2]]}
    assert collate([ReadyBatch([a]), ReadyBatch([b])]) == collate([a, b])


def test_bleu_is_sacrebleu_with_its_signature():
    predictions = ["Ein Hund läuft über die Wiese .", "Zwei Männer sitzen auf einer Bank.", "Das Kind spielt"]
    references = ["Ein Hund rennt über die Wiese.", "Zwei Männer sitzen auf der Bank.", "Ein Kind spielt Ball."]
    result, metric = Bleu().compute(predictions=predictions, references=references), BLEU()
    direct = metric.corpus_score(predictions, [references])
    assert 20 < direct.score < 80
    assert result["score"] == pytest.approx(direct.score, abs=1e-9)
    assert result["counts"] == direct.counts and result["totals"] == direct.totals
    assert result["brevity_penalty"] == pytest.approx(direct.bp)
    assert result["signature"] == str(metric.get_signature()) == bleu_signature()
    assert result["chrf"] == pytest.approx(CHRF().corpus_score(predictions, [references]).score)
    lower = Bleu().compute(predictions=[text.lower() for text in predictions], references=references)
    assert lower["score"] < result["score"]


def test_metrics_leave_fillers_out_and_take_references_as_given(tokenizer):
    texts = ["Dienstag und Mittwoch und Montag", "Freitag, 12. Mai 2073 und später", "in 21 Wochen oder früher"]
    ids = tokenizer(texts)["input_ids"]
    width = max(map(len, ids)) + 2
    labels = np.full((5, width), -100)
    predictions = np.full((5, width + 1), -100)
    for row, tokens in enumerate(ids):
        labels[row, : len(tokens)] = tokens
        predictions[row, : len(tokens) + 1] = [tokenizer.bos_token_id, *tokens]
    labels[3, 4:] = tokenizer.pad_token_id  # as Seq2SeqTrainer pads
    predictions[3:] = tokenizer.eos_token_id
    metrics = TranslationMetrics(tokenizer)
    assert metrics.texts(predictions, labels) == (texts, texts)
    assert metrics(EvalPrediction(predictions, labels))["bleu"] == pytest.approx(100.0)
    given = TranslationMetrics(tokenizer, {tuple(ids[1]): "etwas anderes"})
    assert given.texts(predictions, labels)[1] == [texts[0], "etwas anderes", texts[2]]
