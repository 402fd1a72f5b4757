"""All virtual workers in one pass give the numbers of the loop over them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

from hf_extrap import ExtrapConfig, Extrapolated
from hf_extrap.optim.batch_norm import running_statistics_kept
from hf_extrap.optim.batched_workers import BatchedWorkers
from hf_extrap.recipes.models import (
    ExtrapLstmConfig,
    ExtrapLstmForCausalLM,
    ExtrapResNetConfig,
    ExtrapResNetForImageClassification,
)
from tests.support.plain_loop import (
    BASES,
    CELLS,
    NOISE,
    STEPS,
    Cell,
    distance,
    finishing,
    identical,
    make_batch,
    make_model,
    take_passes,
    values,
    warm_up_and_decay,
)

WORKERS = 3
Batch = dict[str, Any]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"])


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def batched_step(workers: BatchedWorkers, batches: Sequence[Batch], probed: Sequence[Batch] | None = None) -> Tensor:
    if workers.optimizer.wants_probe:
        workers.probe(probed or batches)
    return workers.backward(batches)


def looped_step(
    optimizer: Extrapolated,
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Callable[..., Tensor],
    probed: Sequence[Batch] | None = None,
) -> list[Tensor]:
    losses: list[Tensor] = []

    def backward(worker: int, index: int, probe: object) -> None:
        with running_statistics_kept(model if worker and not probe else None):
            found = loss(model, (batches if probe is None else probed or batches)[worker])
        losses.extend([] if probe else [found])
        (found * optimizer.loss_scale).backward()

    take_passes(optimizer, backward, model=model)
    return losses


def assert_batched_is_looped(
    cell: Cell,
    make: Callable[[], nn.Module],
    batch: Callable[[], Batch],
    loss: Callable[..., Tensor],
    base: Callable[..., torch.optim.Optimizer],
    tolerance: float,
    steps: int,
) -> None:
    """Parameters, buffers, losses and statistics agree."""
    torch.manual_seed(0)
    models = [make()]
    models.append(copy.deepcopy(models[0]))
    looped, batched = (
        Extrapolated(base([p for p in m.parameters() if p.requires_grad]), cell.config, virtual_workers=WORKERS)
        for m in models
    )
    workers = BatchedWorkers(batched, models[1], loss)
    finishes = [
        finishing(optimizer, list(model.parameters()), warm_up_and_decay(optimizer), cell.max_grad_norm)
        for optimizer, model in zip((looped, batched), models, strict=True)
    ]
    torch.manual_seed(3)
    for step in range(steps):
        looped.collect_statistics = batched.collect_statistics = step % 2 == 1
        batches = [batch() for _ in range(WORKERS)]
        probed = [batch() for _ in range(WORKERS)] if cell.config.batch == "independent" else batches
        one_by_one = looped_step(looped, models[0], batches, loss, probed)
        at_once = batched_step(workers, batches, probed)
        torch.testing.assert_close(at_once, torch.stack(one_by_one).detach(), rtol=tolerance, atol=tolerance)
        for optimizer, finish in zip((looped, batched), finishes, strict=True):
            optimizer.observe()
            finish()
        assert looped.statistics == pytest.approx(batched.statistics, rel=100 * tolerance)
    assert distance(*(list(m.parameters()) for m in models)) <= tolerance
    assert distance(*([b for b in m.buffers() if b.numel()] or [torch.zeros(1)] for m in models)) <= tolerance


def sgd(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)


def adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, eps=1e-3)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def rows_of_mlp() -> Batch:
    return {"inputs": torch.randn(5, 6), "labels": torch.randint(3, (5,))}


def doubles_of_mlp() -> Batch:
    return {"inputs": torch.randn(5, 6, dtype=torch.float64), "labels": torch.randint(3, (5,))}


def resnet() -> nn.Module:
    return ExtrapResNetForImageClassification(ExtrapResNetConfig(depth=8, width=4, num_labels=3)).double().train()


def images() -> Batch:
    return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.randint(3, (4,))}


def marian() -> nn.Module:
    """With padding and tied embeddings."""
    layers = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in layers.items()}
    marks = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    config = MarianConfig(vocab_size=20, decoder_vocab_size=20, d_model=8, dropout=0.0, **sizes, **marks)
    return MarianMTModel(config).double().train()


def sentences() -> Batch:
    return {"input_ids": torch.randint(0, 20, (2, 5)), "labels": torch.randint(0, 20, (2, 4))}


# The model, its batches, loss and base optimizer, the tolerance and the number of steps.
MODELS: dict[str, tuple[Any, ...]] = {
    "float32, sgd": (mlp, rows_of_mlp, cross_entropy, sgd, 1e-5, 10),
    "float32, adamw": (mlp, rows_of_mlp, cross_entropy, adamw, 1e-5, 10),
    "resnet": (resnet, images, own_loss, sgd, 1e-9, 4),
    "marian": (marian, sentences, own_loss, adamw, 1e-10, 4),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("preset", ["none", "extrap", "extrap-past", "extragradient", "sam"])
def test_models_with_statistics(preset: str, model: str) -> None:
    assert_batched_is_looped(Cell(ExtrapConfig.preset(preset)), *MODELS[model])


@pytest.mark.parametrize("base", ["sgd", pytest.param("adamw", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("name", [*CELLS, "gaussian", "smoothout"])
def test_every_scheme(name: str, base: str) -> None:
    cell = (CELLS | NOISE)[name]
    assert_batched_is_looped(cell, lambda: mlp().double(), doubles_of_mlp, cross_entropy, BASES[base], 1e-10, STEPS)


@pytest.mark.parametrize("preset", ["none", "extrap-past"])
def test_parameters_without_a_gradient_are_not_decayed(preset: str) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Half()
    before = values([model.unused.weight, model.used.weight])
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    workers = BatchedWorkers(Extrapolated(base, ExtrapConfig.preset(preset), virtual_workers=2), model, cross_entropy)
    workers.backward([{"inputs": torch.randn(4, 6), "labels": torch.randint(3, (4,))}] * 2)
    base.step()
    assert torch.equal(model.unused.weight, before[0]) and not torch.equal(model.used.weight, before[1])


@pytest.mark.parametrize("preset", ["extrap", "extragradient"])
def test_both_passes_see_the_same_dropout_and_workers_different(preset: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    config = ExtrapConfig.preset(preset, step_size=1e-9)
    optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=0.1), config, virtual_workers=2)
    optimizer.collect_statistics = True  # which keeps the directions until the step's end
    batches = [{"inputs": torch.ones(4, 6), "labels": torch.zeros(4, dtype=torch.long)}] * 2
    losses = batched_step(BatchedWorkers(optimizer, model, cross_entropy), batches)
    directions = optimizer.local_state_dict()["directions"]
    mean = directions["0.0"] if preset == "extragradient" else (directions["0.0"] + directions["1.0"]) / 2
    torch.testing.assert_close(model[1].weight.grad, mean)
    assert losses[0] != losses[1]


def test_bfloat16_autocast_is_that_of_the_loop() -> None:
    grads = []
    for at_once in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
        config = ExtrapConfig.preset("extrap", step_ratio=1.0)
        optimizer = Extrapolated(torch.optim.SGD(model.parameters(), lr=1.0), config, virtual_workers=2)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return cross_entropy(model, batch)

        batches = [{"inputs": torch.randn(8, 6), "labels": torch.randint(3, (8,))} for _ in range(2)]
        if at_once:
            batched_step(BatchedWorkers(optimizer, model, loss), batches)
        else:
            looped_step(optimizer, model, batches, loss)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 1e-2


def test_models_and_batches_that_cannot_be_batched_are_refused() -> None:
    def workers(model: nn.Module, loss: Callable[..., Tensor] = cross_entropy, **options: Any) -> BatchedWorkers:
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        return BatchedWorkers(Extrapolated(base, ExtrapConfig(), virtual_workers=2, **options), model, loss)

    lstm = ExtrapLstmForCausalLM(ExtrapLstmConfig(vocab_size=10, embedding_size=4, hidden_size=4, num_hidden_layers=1))
    with pytest.raises(ValueError, match="ExtrapLstmForCausalLM has the recurrent layer .*cannot batch"):
        workers(lstm)
    with pytest.raises(ValueError, match="no loss scaling"):
        workers(nn.Linear(6, 3), grad_scaler=torch.amp.GradScaler("cpu"))
    rows = [{"inputs": torch.randn(n, 6), "labels": torch.zeros(n, dtype=torch.long)} for n in (4, 3)]
    with pytest.raises(ValueError, match=r"shape of 'inputs': \(4, 6\), \(3, 6\)"):
        workers(nn.Linear(6, 3)).backward(rows)

    def depends_on_data(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["inputs"]).sum() if batch["labels"].all() else model(batch["inputs"]).mean()

    with pytest.raises(ValueError, match="Linear cannot be batched over workers"):
        workers(nn.Linear(6, 3), depends_on_data).backward([rows[0]] * 2)


def test_a_gradient_that_is_not_finite_skips_the_step() -> None:
    model = make_model()
    config = ExtrapConfig.preset("extrap-past", step_ratio=0.5)
    optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), config, virtual_workers=2)
    workers = BatchedWorkers(optimizer, model, cross_entropy)
    for step in range(3):
        batches = [dict(zip(("inputs", "labels"), make_batch(step, k), strict=True)) for k in range(2)]
        if step == 2:
            batches[1]["inputs"][0, 0] = torch.inf
        before = values(list(model.parameters()))
        workers.backward(batches)
        optimizer.step()
        optimizer.zero_grad()
        assert identical(before, list(model.parameters())) == (step == 2)
    assert optimizer.skipped_steps == 1 and optimizer.step_count == 2
    assert not optimizer.local_state_dict()["directions"]
