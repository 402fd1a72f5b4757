"""BatchNorm's running statistics: untouched by probes, and recalibrated to those of the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.batch_norm import recalibrate, running_statistics, running_statistics_kept


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))


def data(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 8, 3, generator=torch.Generator().manual_seed(1)))


def buffers(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_passes_inside_normalise_by_their_batch_and_leave_no_trace() -> None:
    model = network()
    model[2].p = 0.0
    expected = model(data()[0])
    before = buffers(model)
    with running_statistics_kept(model):
        assert torch.equal(model(data()[0]), expected)
    assert same(buffers(model), before)
    model(data()[0])
    assert int(model[1].num_batches_tracked) == 2
    assert not same(buffers(model), before)


def test_evaluation_inside_still_uses_the_running_statistics() -> None:
    model = network().eval()
    expected = model(data()[0])
    with running_statistics_kept(model):
        assert torch.equal(model(data()[0]), expected)


@pytest.mark.parametrize("preset", ["extrap", "extragradient", "sam"])
def test_a_probe_leaves_the_statistics_bit_identical(preset: str) -> None:
    model = network()
    optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=0.1), ExtrapConfig.preset(preset))
    for step, batch in enumerate(data()):
        before = buffers(model)
        assert optimizer.wants_probe
        with optimizer.probing(model=model):
            model(batch).square().mean().backward()
        assert same(buffers(model), before)
        optimizer.train()
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert int(model[1].num_batches_tracked) == step + 1


def test_recalibrated_statistics_are_the_mean_of_the_batches_own() -> None:
    model = network().eval()
    model(data()[0])
    batches = data()
    state, parameters = torch.random.get_rng_state(), [p.clone() for p in model.parameters()]
    recalibrate(model, batches, model)
    hidden = [model[0](batch) for batch in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert not model.training and not model[1].training and model[1].momentum == 0.1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(list(model.parameters()), parameters) and all(p.grad is None for p in model.parameters())


def test_an_error_leaves_momentum_and_modes() -> None:
    model = network().train()
    with pytest.raises(ZeroDivisionError):
        recalibrate(model, data(), lambda batch: 1 / 0)
    assert model[1].momentum == 0.1 and model.training


def test_layers_without_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=False))
    assert running_statistics(model) == []
    recalibrate(model, data(), lambda batch: pytest.fail("passed"))
    with running_statistics_kept(model):
        model(data()[0])
    assert model[1].track_running_stats is False
