"""Plain text: the built-in corpus, word-level vocabularies, and token streams kept on disk."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import numpy as np
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import tqdm

from hf_extrap.recipes.task import SPLITS, cached_folder, content_fingerprint

UNKNOWN, END = "<unk>", "<eos>"
#: A word of the built-in text must occur this often in its training split; WikiText-2 has the same rule.
MIN_COUNT = 3


def builtin_text() -> datasets.DatasetDict:
    """Return English text that comes with Python: the language reference in `pydoc_data.topics`.

    One row is one paragraph: lower-cased words and punctuation marks between spaces, rare words as `<unk>`. A topic
    lies in one split only, chosen by a hash of its name (8/10 train, 1/10 each of the others), and a paragraph that
    several topics repeat is kept once.
    """
    rows: dict[str, list[list[str]]] = {name: [] for name in SPLITS}
    seen = set()
    for topic in sorted(topics):
        split = {0: "validation", 1: "test"}.get(zlib.crc32(topic.encode()) % 10, "train")
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            words = tuple(re.findall(r"\w+|[^\w\s]", paragraph.lower()))
            if len(words) > 3 and words not in seen:  # shorter ones are headings and rules
                seen.add(words)
                rows[split].append(list(words))
    counts = Counter(word for words in rows["train"] for word in words)
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"text": [" ".join(w if counts[w] >= MIN_COUNT else UNKNOWN for w in words) for words in paragraphs]}
            )
            for name, paragraphs in rows.items()
        }
    )


def word_level_tokenizer(
    splits: Mapping[str, Iterable[dict[str, str]]], vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Build the tokenizer whose vocabulary is every word between spaces, in all splits, `<unk>` and `<eos>`.

    It pads on the left, for generation, with `<eos>`: the attention mask tells padding apart.

    Args:
        splits: Rows with a column `text`; all splits count, as in the published vocabulary of WikiText-2 (33,278).
        vocab_size: Keep only so many types, those most frequent in `train`; the others become `<unk>`.

    Raises:
        ValueError: If `vocab_size` leaves no room for a word beside `<unk>` and `<eos>`.
    """
    if vocab_size is not None and vocab_size < 3:
        raise ValueError(f"`vocab_size` is {vocab_size}: it must be at least 3, for {UNKNOWN}, {END} and one word.")
    counts = {name: Counter(word for row in rows for word in row["text"].split()) for name, rows in splits.items()}
    total = sum(counts.values(), Counter())
    ranked = sorted(total.keys() - {UNKNOWN, END}, key=lambda word: (-counts["train"][word], -total[word], word))
    types = [UNKNOWN, END, *ranked][:vocab_size]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(types)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    # Each word brings the space before it, so that texts decoded in pieces can be joined.
    tokenizer.decoder = decoders.Replace(Regex("^"), " ")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def token_streams(
    splits: datasets.DatasetDict,
    cache_root: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int | None = None,
) -> tuple[PreTrainedTokenizerBase, dict[str, np.ndarray]]:
    """Encode every split as one stream of token ids, or find it encoded.

    Each row ends in the end-of-text token; one more stands before the first row, so that every token is a target.

    Args:
        splits: Rows with a column `text`.
        cache_root: Where the ids and the tokenizer are kept, under a fingerprint of the rows and the settings.
        tokenizer: Encodes the rows; by default a word-level one is built.
        vocab_size: Cap for the word-level vocabulary.

    Returns:
        The tokenizer, and for each split its ids, (tokens + 1,) int32, mapped from disk.

    Raises:
        ValueError: If the given tokenizer has no end-of-text token, or a split is empty.
    """
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise ValueError("the model's tokenizer has no `eos_token`: rows could not be told apart, so give it one.")
    encoder = None if tokenizer is None else sorted(tokenizer.get_vocab().items())
    key = f"text-{content_fingerprint(splits, vocab_size, encoder)}"

    def build(folder: Path) -> None:
        made = tokenizer or word_level_tokenizer(splits, vocab_size)
        made.save_pretrained(folder / "tokenizer")
        for name, rows in splits.items():
            ids = np.fromiter(_encode(made, rows, name), dtype=np.int32)
            np.save(folder / f"{name}.npy", ids, allow_pickle=False)

    folder = cached_folder(cache_root, key, build)
    if tokenizer is None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return tokenizer, {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in splits}


def _encode(tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, name: str) -> Iterator[int]:
    end = tokenizer.eos_token_id
    yield end
    size = 1000
    batches = rows.iter(batch_size=size)
    for batch in tqdm(batches, desc=f"Tokenizing {name}", total=-(-len(rows) // size), leave=False):
        for ids in tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]:
            yield from ids
            yield end
