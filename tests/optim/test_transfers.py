"""Copies between host and device: their order on streams, and on a GPU the numbers of directions kept on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.transfers import Transfers
from tests.support.plain_loop import make_batch, make_model

WORKERS = 3
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which copies while it computes")


def test_copies_are_made_on_the_spot_without_a_gpu() -> None:
    to, source = torch.zeros(3), torch.arange(3.0)
    Transfers().copy([(to, source)])
    assert torch.equal(to, source)


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def stream(name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: done.append(f"{name} waits for {other.name}"),
            synchronize=lambda: done.append(f"host waits for {name}"),
        )

    def tensor(name: str, device: str) -> Any:
        def copy(source: Any, non_blocking: bool = False) -> None:
            done.append(f"{current[-1].name}: {source.name} to {name}{'' if non_blocking else ', blocking'}")

        def record(stream: Any) -> None:
            done.append(f"{name} belongs to {stream.name} too")

        return SimpleNamespace(name=name, device=torch.device(device), copy_=copy, record_stream=record)

    current = [stream("compute")]

    @contextmanager
    def use(stream: Any) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])

    near, host = tensor("near", "cuda:0"), tensor("host", "cpu")
    transfers = Transfers()
    transfers.copy([(host, near)])
    transfers.copy([(near, host)])
    transfers.join()
    transfers.join()
    transfers.finish()
    assert done == [
        "side waits for compute",
        "side: near to host",
        "near belongs to side too",
        "side waits for compute",
        "side: host to near",
        "near belongs to side too",
        "compute waits for side",
        "host waits for side",
    ]


@on_a_gpu
def test_a_copy_waits_for_what_it_reads_and_is_waited_for() -> None:
    transfers = Transfers()
    near, host = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, pin_memory=True)
    torch.cuda._sleep(100_000_000)
    near.fill_(1)
    transfers.copy([(host, near)])
    transfers.finish()
    assert bool((host == 1).all())
    host.fill_(2)
    with torch.cuda.stream(transfers._stream(near.device)):
        torch.cuda._sleep(100_000_000)
    transfers.copy([(near, host)])
    transfers.join()
    assert bool((near.clone() == 2).all())


def train(place: str | None, preset: str, steps: int, watched: bool = False, **fields: Any) -> nn.Module:
    model = make_model(torch.float32).cuda()
    config = ExtrapConfig.preset(preset, direction_device=place, check_finite=not watched, **fields)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    optimizer = Extrapolated(base, config, virtual_workers=WORKERS)
    batches = [[t.cuda() for t in make_batch(0, worker, dtype=torch.float32)] for worker in range(WORKERS)]
    for step in range(steps):
        torch.cuda.set_sync_debug_mode("error" if watched and step > 3 else "default")
        try:
            for worker, (inputs, labels) in enumerate(batches):
                if optimizer.wants_probe:
                    with optimizer.probing(worker=worker):
                        nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.train(worker=worker)
                nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return model


@on_a_gpu
@pytest.mark.parametrize("swap", [None, True])
@pytest.mark.parametrize("preset", ["extrap-past", "optimistic", "extrap", "past-update"])
def test_the_host_gives_a_gpus_numbers(preset: str, swap: bool | None) -> None:
    near, far = (train(place, preset, steps=8, swap=swap) for place in (None, "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(near.parameters(), far.parameters(), strict=True))


@on_a_gpu
@pytest.mark.parametrize("preset", ["extrap-past", "extrap"])
def test_nobody_waits_for_a_copy(preset: str) -> None:
    train("cpu", preset, steps=8, watched=True)
