"""Batches counted in tokens: fixed, length-grouped batches for training, full ones for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

#: One example: `input_ids`, `attention_mask` and `labels`, each a list of ints.
Example = dict[str, list[int]]


class ReadyBatch(list[Example]):
    """Examples that are always collated together.

    Attributes:
        collated: the last collator and its result, reused by that collator.
    """

    collated: tuple[object, dict[str, Any]] | None = None


class TokenBatches(Dataset):
    """A map-style dataset whose items are whole batches of examples of similar length.

    The batches are fixed: a seeded shuffle followed by a stable sort by length (as in fairseq) groups the examples
    once. From epoch to epoch the Trainer's sampler changes only the order of the batches, so sharding over processes
    and resuming in the middle of an epoch work as with any other dataset. Use it with
    `per_device_train_batch_size=1` and an `UnwrappingCollator`, which caches the tensors of every batch.

    `batch_tokens` limits number of examples × longest source, and number of examples × longest target, of a batch.

    Raises:
        ValueError: if there is no example, or one longer than `batch_tokens`.
    """

    def __init__(self, examples: Sequence[Mapping[str, Any]], batch_tokens: int, seed: int = 0) -> None:
        self.examples: list[Example] = [dict(example) for example in examples]
        if not self.examples:
            raise ValueError("the training split has no examples; allowed: at least one.")
        sources, targets = lengths(self.examples)
        longest = int(max(sources.max(), targets.max()))
        if longest > batch_tokens:
            raise ValueError(
                f"`batch_tokens` is {batch_tokens}, less than the {longest} tokens of the longest example: "
                "increase it or decrease `max_length`."
            )
        self.batch_tokens = batch_tokens
        self.batches = _group(sources, targets, batch_tokens, seed)
        self._ready = [ReadyBatch(self.examples[i] for i in batch) for batch in self.batches]
        self.target_tokens = int(targets.sum())

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> ReadyBatch:
        return self._ready[index]

    @property
    def tokens_per_batch(self) -> float:
        """Mean number of target tokens in a batch, without padding."""
        return self.target_tokens / len(self)

    @property
    def padding_share(self) -> float:
        """Share of padding among the target positions of an epoch, from 0 to 1."""
        _, targets = lengths(self.examples)
        positions = sum(len(batch) * int(targets[batch].max()) for batch in self.batches)
        return 1.0 - self.target_tokens / positions


def lengths(examples: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of source and of target tokens of each example, both of shape (examples,)."""
    sources = np.array([len(example["input_ids"]) for example in examples], dtype=np.int64)
    return sources, np.array([len(example["labels"]) for example in examples], dtype=np.int64)


def _group(sources: np.ndarray, targets: np.ndarray, batch_tokens: int, seed: int) -> list[np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(sources))
    order = order[np.lexsort((sources[order], targets[order]))]
    batches, start, longest = [], 0, 0
    for position, index in enumerate(order):
        longest_with_it = max(longest, int(sources[index]), int(targets[index]))
        if (position + 1 - start) * longest_with_it > batch_tokens:
            batches.append(order[start:position])
            start, longest_with_it = position, int(max(sources[index], targets[index]))
        longest = longest_with_it
    batches.append(order[start:])
    return batches


class FullBatches(Dataset):
    """Evaluation examples sorted by length and filled up such that every batch of every process is full.

    `Seq2SeqTrainer` gathers predictions with `gather`, which needs equally many rows from each process and keeps the
    rows that a sampler repeats to fill the last batches. Fillers replace those rows: a filler has the source of the
    example before it and no labels, and `TranslationMetrics` leaves out rows without labels. So each example counts
    exactly once with any number of processes; `batch_size` is that of one process.

    Raises:
        ValueError: if labels are empty, or there are fewer examples than batches: a loss of fillers is undefined.
    """

    def __init__(self, examples: Sequence[Mapping[str, Any]], batch_size: int, world_size: int) -> None:
        rows: list[Example] = [dict(example) for example in examples]
        sources, targets = lengths(rows)
        if len(rows) == 0 or targets.min() == 0:
            raise ValueError("evaluation needs at least one example, and labels that are not empty.")
        rows = [rows[i] for i in np.lexsort((targets, sources))]
        batches = -(-len(rows) // (batch_size * world_size)) * world_size
        if len(rows) < batches:
            raise ValueError(
                f"{len(rows)} evaluation examples are too few for {batches} batches, the same number for each of "
                f"{world_size} processes: give more, or a larger per_device_eval_batch_size."
            )
        self.items: list[Example] = []
        for chunk in np.array_split(np.arange(len(rows)), batches):
            batch = [rows[i] for i in chunk]
            self.items += batch + [{**batch[-1], "labels": []}] * (batch_size - len(batch))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]


class UnwrappingCollator:
    """Collates examples, or ready batches of examples, with another collator.

    The tensors of a ready batch that comes alone are cached for the next epochs. They must not be modified in place.
    """

    def __init__(self, collator: Callable[[list[Example]], Any]) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[Example | ReadyBatch]) -> Any:
        if len(items) == 1 and isinstance(batch := items[0], ReadyBatch):
            if batch.collated is None or batch.collated[0] is not self:
                batch.collated = self, self.collator(batch)
            # A copy: the Trainer removes entries from a batch.
            return dict(batch.collated[1])
        return self.collator([example for item in items for example in (item if isinstance(item, list) else [item])])
