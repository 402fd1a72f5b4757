"""Contiguous streams of tokens: how truncated backpropagation through time reads a text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100


class StreamDataset(Dataset):
    """A text cut into parallel streams, and each stream into chunks of `seq_len` targets.

    Item `t * streams + s` is chunk t of stream s. Read in this order with batches of B, over W processes and A
    accumulated micro-batches, `streams = B * W * A` makes batch number `t * W * A + m` hold chunk t of the m-th block
    of B streams. Processes take batches in turn, so block m is always on process m % W, as its micro-batch m // W: a
    worker, real or virtual, reads on where it stopped.

    An item has `seq_len + 1` tokens: the last one is also the first of the next chunk. `labels` equal `input_ids`, as
    every causal model of the library shifts them itself; the first is -100, being a target of the chunk before. So
    each token of the text after the first is a target exactly once.

    Args:
        ids: (tokens + 1,) integers; the first is context only.
        streams: Number of parallel streams.
        seq_len: Targets a chunk (the length of backpropagation through time).
        complete: Cover every token: the last chunks are padded, with labels -100. Otherwise the end that does not fill
            a chunk in all the streams is left out, as is usual for training.
        name: Of the split, for messages.

    Raises:
        ValueError: If the text is too short for so many streams.
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
                f"{seq_len} need {needed}: lower the batch size or `seq_len`, or give more text."
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
        chunk, stream = divmod(index, self.streams)
        begin = stream * self.stream_length + chunk * self.seq_len
        end = min(begin + self.seq_len, (stream + 1) * self.stream_length, self.targets)
        count = max(end - begin, 0)
        input_ids = torch.zeros(self.seq_len + 1, dtype=torch.long)
        labels = torch.full((self.seq_len + 1,), IGNORED, dtype=torch.long)
        if count:
            input_ids[: count + 1] = torch.from_numpy(self.ids[begin : end + 1].astype(np.int64))
            labels[1 : count + 1] = input_ids[1 : count + 1]
        return {"input_ids": input_ids, "labels": labels}
