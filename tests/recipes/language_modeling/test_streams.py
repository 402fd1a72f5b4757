"""Streams: the tokens of each worker, and that each token is counted exactly once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from hf_extrap.recipes.language_modeling.streams import StreamDataset, collate
from hf_extrap.recipes.models.vocabulary_head import IGNORED


def worker_texts(world_size: int, accumulation: int, batch: int = 2, seq_len: int = 3) -> dict[int, np.ndarray]:
    """What each worker reads, (steps, batch, seq_len + 1), with batches distributed as by accelerate."""
    workers = world_size * accumulation
    data = StreamDataset(np.arange(1 + 4 * workers * batch * seq_len), streams=batch * workers, seq_len=seq_len)
    texts: dict[int, list[np.ndarray]] = {}
    for rank in range(world_size):
        sampler = BatchSampler(SequentialSampler(data), batch, drop_last=False)
        for number, indices in enumerate(BatchSamplerShard(sampler, world_size, rank)):
            chunk = np.stack([data[i]["input_ids"].numpy() for i in indices])
            # Virtual worker v of rank r is global worker v * W + r.
            texts.setdefault((number % accumulation) * world_size + rank, []).append(chunk)
    return {worker: np.stack(chunks) for worker, chunks in texts.items()}


@pytest.mark.parametrize("splits", [[(1, 1)], [(1, 2), (2, 1)], [(1, 4), (2, 2), (4, 1)]])
def test_a_worker_real_or_virtual_reads_one_contiguous_text(splits: list[tuple[int, int]]) -> None:
    first, *others = (worker_texts(*split) for split in splits)
    for chunks in first.values():
        # The text is 0, 1, 2, ...: each chunk begins with the last token of the chunk before.
        assert len(chunks) == 4 and (chunks[1:, :, 0] == chunks[:-1, :, -1]).all()
        assert (np.diff(chunks, axis=2) == 1).all()
    for other in others:
        assert first.keys() == other.keys() and all((first[worker] == other[worker]).all() for worker in first)


@pytest.mark.parametrize("streams", [1, 3, 8])
@pytest.mark.parametrize("seq_len", [1, 4, 50])
@pytest.mark.parametrize("targets", [8, 23, 40])
def test_complete_counts_every_token_once(streams: int, seq_len: int, targets: int) -> None:
    data = StreamDataset(np.arange(targets + 1), streams=streams, seq_len=seq_len, complete=True)
    counted = []
    for item in (data[i] for i in range(len(data))):
        kept = item["labels"] != IGNORED
        assert item["input_ids"].shape == item["labels"].shape == (seq_len + 1,)
        assert torch.equal(item["labels"][kept], item["input_ids"][kept])
        assert not kept[0]
        # A counted target is predicted from the token before it.
        assert torch.equal(item["input_ids"][:-1][kept[1:]] + 1, item["labels"][1:][kept[1:]])
        counted += item["labels"][kept].tolist()
    assert sorted(counted) == list(range(1, targets + 1))
    assert data.targets == targets


def test_training_omits_the_incomplete_end_and_refuses_a_short_text() -> None:
    data = StreamDataset(np.arange(100), streams=4, seq_len=5)
    targets = sorted(t for i in range(len(data)) for t in data[i]["labels"].tolist() if t != IGNORED)
    assert targets == list(range(1, 81))
    assert (len(data), data.targets) == (16, 80)
    with pytest.raises(IndexError):
        data[16]
    with pytest.raises(ValueError, match="train has 19 tokens and 4 streams .* need 20"):
        StreamDataset(np.arange(20), streams=4, seq_len=5, name="train")
    with pytest.raises(ValueError, match="need 4"):
        StreamDataset(np.arange(4), streams=4, seq_len=5, complete=True)


class CountedText(np.ndarray):
    """A text that counts its reads."""

    reads = 0

    def __getitem__(self, key: object) -> np.ndarray:
        type(self).reads += 1
        return np.asarray(self)[key]


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_a_batch_holds_the_items_and_is_read_at_once(batch: int, complete: bool) -> None:
    text = np.arange(100, 191, dtype=np.uint16).view(CountedText)
    data = StreamDataset(text, streams=8, seq_len=5, complete=complete)
    items = [data[i] for i in range(len(data))]
    CountedText.reads = 0
    batches = list(DataLoader(data, batch, collate_fn=collate))
    assert CountedText.reads == len(batches) == len(data) // batch
    for number, whole in enumerate(batches):
        alone = items[number * batch : (number + 1) * batch]
        assert whole.keys() == {"input_ids", "labels"}
        for name, tensor in whole.items():
            assert tensor.dtype == torch.int64 and torch.equal(tensor, torch.stack([item[name] for item in alone]))
    assert torch.equal(collate(items[:3])["input_ids"], torch.stack([item["input_ids"] for item in items[:3]]))
