"""Contiguous streams of tokens, for truncated backpropagation through time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import default_data_collator

from hf_extrap.recipes.models.vocabulary_head import IGNORED


class StreamDataset(Dataset):
    """A text divided into parallel streams, and each stream into chunks of `seq_len` targets.

    Item `t * streams + s` is chunk t of stream s. Read in this order with batch size B, W processes and A accumulated
    micro-batches, `streams = B * W * A` makes batch number `t * W * A + m` contain chunk t of the m-th block of B
    streams. Processes take batches in turn, so process m % W always gets block m, as its micro-batch m // W: every
    worker, real or virtual, reads its streams contiguously.

    An item has `seq_len + 1` tokens; the last one is also the first of the next chunk. `labels` equal `input_ids`,
    since causal models of Transformers shift them, except that the first is -100: it is a target of the chunk before.
    So each token of the text after the first is a target exactly once.

    Args:
        ids: (tokens + 1,) integers; the first is context only.
        streams: number of parallel streams.
        seq_len: targets of a chunk (the length of backpropagation through time).
        complete: pad the last chunks, with labels -100, instead of dropping the tokens that do not fill a chunk in
            every stream.
        name: name of the split in errors.

    Raises:
        ValueError: if the text is too short for that many streams.
    """

    def __init__(
        self, ids: np.ndarray, *, streams: int, seq_len: int, complete: bool = False, name: str = "the text"
    ) -> None:
        self.ids, self.streams, self.seq_len = ids, streams, seq_len
        targets = len(ids) - 1
        needed = streams if complete else streams * seq_len
        if targets < needed:
            raise ValueError(
                f"{name} has {targets} tokens and {streams} streams (batch size x processes x accumulated batches) of "
                f"{seq_len} need {needed}: decrease the batch size or `seq_len`, or give more text."
            )
        if complete:
            self.stream_length = -(-targets // streams)
            self.chunks = -(-self.stream_length // seq_len)
            self.targets = targets
        else:
            self.chunks = targets // (streams * seq_len)
            self.stream_length = self.chunks * seq_len
            self.targets = streams * self.stream_length

    def __len__(self) -> int:
        return self.chunks * self.streams

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return {name: rows[0] for name, rows in self._batch([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return a whole batch, for `collate`, with a number of operations that does not depend on its size."""
        return [self._batch(indices)]

    def _batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        chunk, stream = np.divmod(np.asarray(indices)[:, None], self.streams)
        begin = stream * self.stream_length + chunk * self.seq_len
        end = np.minimum(begin + self.seq_len, np.minimum((stream + 1) * self.stream_length, self.targets))
        offsets = np.arange(self.seq_len + 1)
        # A row without targets has no context either.
        read = (offsets <= end - begin) & (begin < end)
        input_ids = np.where(read, self.ids[np.minimum(begin + offsets, self.targets)], 0).astype(np.int64)
        labels = np.where(read & (offsets > 0), input_ids, IGNORED)
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack single chunks; a whole batch of a `StreamDataset` is returned unchanged."""
    return items[0] if items[0]["input_ids"].dim() == 2 else default_data_collator(list(items))
