"""Both passes of a fresh step see one model: dropout masks, compiled models, closures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.plain_loop import (
    BASES,
    CELLS,
    assert_same_run,
    identical,
    loss_at,
    make_model,
    run_plain_loop,
    sgd,
)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.dropout, self.last = nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3)
        self.masks: list[Tensor] = []
        self.dropout.register_forward_hook(lambda module, inputs, output: self.masks.append(output != 0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.dropout(self.first(inputs)))


@pytest.mark.parametrize("preset", ["extrap", "sam"])
def test_both_passes_see_the_same_masks(preset: str) -> None:
    model = Dropping()
    optimizer = Extrapolated(sgd(list(model.parameters())), ExtrapConfig.preset(preset), virtual_workers=2)
    torch.manual_seed(8)
    for step in range(2):
        for k in range(2):
            with optimizer.probing(worker=k):
                (loss_at(model, step, k) / 2).backward()
            optimizer.train(worker=k)
            (loss_at(model, step, k) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = list(zip(model.masks[::2], model.masks[1::2], strict=True))
    assert all(torch.equal(probe, regular) for probe, regular in pairs)
    assert len({tuple(regular.flatten().tolist()) for _, regular in pairs}) == 4
    after = torch.rand(3)
    torch.manual_seed(8)
    for _ in range(4):
        nn.functional.dropout(torch.ones(7, 64), 0.5)
    assert torch.equal(after, torch.rand(3))


def test_global_probes_see_the_masks_of_their_batches() -> None:
    """All probes come first, then all regular passes: worker k's masks are the same in both."""
    model = Dropping()
    optimizer = Extrapolated(sgd(list(model.parameters())), ExtrapConfig.preset("extragradient"), virtual_workers=2)
    with optimizer.probing():
        for k in range(2):
            (loss_at(model, 0, k) / 2).backward()
    for k in range(2):
        optimizer.train(worker=k)
        (loss_at(model, 0, k) / 2).backward()
    assert torch.equal(model.masks[0], model.masks[2]) and torch.equal(model.masks[1], model.masks[3])
    assert not torch.equal(model.masks[0], model.masks[1])


def test_independent_samples_have_masks_of_their_own() -> None:
    model = Dropping()
    optimizer = Extrapolated(sgd(list(model.parameters())), ExtrapConfig.preset("extrap", batch="independent"))
    with optimizer.probing():
        loss_at(model, 1).backward()
    optimizer.train()
    loss_at(model, 0).backward()
    assert not torch.equal(*model.masks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["extrap", "extrap-past", "extragradient"])
def test_a_compiled_model_sees_y_and_is_not_compiled_again(name: str, backend: str) -> None:
    torch._dynamo.reset()
    config = CELLS[name].config
    model = make_model()
    compiled = torch.compile(model, backend=backend)
    optimizer = Extrapolated(sgd(list(model.parameters())), config, virtual_workers=2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run = run_plain_loop(compiled, optimizer, config, [0, 1], steps=4)
    plain = make_model()
    optimizer = Extrapolated(sgd(list(plain.parameters())), config, virtual_workers=2)
    assert_same_run(run, run_plain_loop(plain, optimizer, config, [0, 1], steps=4), 1e-11)
    torch._dynamo.reset()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("preset", ["none", "extrap", "extrap-past", "past-update", "sam"])
def test_a_closure_is_taken_where_a_loop_has_one(preset: str, base: str) -> None:
    config = ExtrapConfig.preset(preset)
    plain = make_model()
    plain_optimizer = Extrapolated(BASES[base](list(plain.parameters())), config)
    expected = run_plain_loop(plain, plain_optimizer, config, [0], steps=4)
    model = make_model()
    optimizer = Extrapolated(BASES[base](list(model.parameters())), config)
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            return loss

        with torch.no_grad():
            at_y = copy.deepcopy(model)
            at_y.load_state_dict(dict(zip(model.state_dict(), expected.y[step][0], strict=True)))
        assert optimizer.step(closure).item() == loss_at(at_y, step).item()
        assert identical(list(model.parameters()), expected.x[step + 1])
    assert optimizer.skipped_steps == 0
