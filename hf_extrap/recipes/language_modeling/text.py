"""Plain text: the built-in corpus, word-level vocabularies, and token streams cached on disk."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import tqdm

from hf_extrap.recipes.data import SPLITS, cached_folder, content_fingerprint
from hf_extrap.training.extras import extra

if TYPE_CHECKING:
    import datasets

UNKNOWN, END = "<unk>", "<eos>"
#: Words of the built-in text that are rarer in its training split become `<unk>`, as in WikiText-2.
MIN_COUNT = 3


def builtin_text() -> datasets.DatasetDict:
    """Return English text from Python's standard library: the language reference in `pydoc_data.topics`.

    A row is a paragraph: lower-case words and punctuation marks separated by spaces, rare words as `<unk>`. A topic is
    in one split only, by a hash of its name (8/10 train, 1/10 each of the others); repeated paragraphs are dropped.
    """
    with extra("recipes"):
        import datasets

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
    """Build a tokenizer of all words of all splits, `<unk>` and `<eos>`.

    It pads on the left, for generation, with `<eos>`; the attention mask marks padding. All splits count, as in the
    published vocabulary of WikiText-2 (33,278). Of more than `vocab_size`, the words most frequent in `train` are kept.

    Raises:
        ValueError: if `vocab_size` is less than 3.
    """
    if vocab_size is not None and vocab_size < 3:
        raise ValueError(f"`vocab_size` is {vocab_size}; allowed: at least 3 ({UNKNOWN}, {END} and one word).")
    counts = {name: Counter(word for row in rows for word in row["text"].split()) for name, rows in splits.items()}
    total = sum(counts.values(), Counter())
    ranked = sorted(total.keys() - {UNKNOWN, END}, key=lambda word: (-counts["train"][word], -total[word], word))
    types = [UNKNOWN, END, *ranked][:vocab_size]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(types)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    # Every word is decoded with a space before it, so that texts decoded in pieces can be joined.
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
    """Encode every split as one stream of token ids, cached under a fingerprint of the rows and the settings.

    Each row ends with the end-of-text token; another one precedes the first row, so that every token is a target. The
    default tokenizer is a word-level one of the splits, of at most `vocab_size` words.

    Returns:
        The tokenizer, and for each split its ids, (tokens + 1,) int32, mapped from disk.

    Raises:
        ValueError: if the given tokenizer has no end-of-text token.
    """
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise ValueError("the model's tokenizer has no `eos_token`, which ends every row: set one.")
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
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")  # nosec B615 # a local folder
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
