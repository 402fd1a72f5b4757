"""Hessian-vector products and their largest eigenvalue against dense Hessians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM
from hf_extrap.training.curvature.lanczos import largest_eigenpair
from hf_extrap.training.curvature.mean_loss import CurvatureError, MeanLoss, flatten, split
from hf_extrap.training.curvature.preconditioner import adam_preconditioner, preconditioned
from tests.support.tiny_trainer import marian

Loss = Callable[[Any], Tensor]


def mlp(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Loss, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3)).to(dtype)
    batches = [(torch.randn(6, 5, dtype=dtype), torch.randint(3, (6,))) for _ in range(3)]
    return model, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), batches


def dense_hessian(model: nn.Module, mean: Callable[[], Tensor]) -> Tensor:
    """The Hessian of `mean`, row by row, in evaluation mode; independent of the code under test."""
    model.eval()
    parameters = list(model.parameters())
    first = torch.autograd.grad(mean(), parameters, create_graph=True)
    rows = []
    for entry in torch.cat([g.reshape(-1) for g in first]):
        rows.append(flatten(torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)))
    return torch.stack(rows)


def largest(hessian: Tensor) -> float:
    return float(torch.linalg.eigvalsh(hessian.double())[-1])


def test_mlp_equals_the_hessian_of_torch_func() -> None:
    model, loss, batches = mlp()
    names = [name for name, _ in model.named_parameters()]
    like = list(model.parameters())
    model.eval()

    def mean(vector: Tensor) -> Tensor:
        parts = dict(zip(names, split(vector, like), strict=True))
        return sum(F.cross_entropy(functional_call(model, parts, x), y) for x, y in batches) / 3

    dense = torch.func.hessian(mean)(flatten(like))
    model.train()
    mean_loss = MeanLoss(model, loss, batches)
    v = torch.randn(dense.shape[0])
    torch.testing.assert_close(mean_loss.hessian_product(v), dense @ v, atol=1e-6, rtol=1e-4)
    pair = largest_eigenpair(mean_loss.hessian_product, mean_loss.point, tolerance=1e-4)
    assert pair.value == pytest.approx(largest(dense), rel=1e-5)
    assert pair.residual < 1e-3 and pair.products < 50
    assert float(pair.vector.norm()) == pytest.approx(1, abs=1e-5)
    assert mean_loss.product_error(pair.vector) < 1e-2
    # The model and the random numbers are unchanged.
    assert model.training and model[2].training
    assert all(p.grad is None for p in model.parameters())
    state = torch.get_rng_state()
    again = largest_eigenpair(mean_loss.hessian_product, mean_loss.point, tolerance=1e-4)
    assert again.value == pair.value and torch.equal(torch.get_rng_state(), state)


def test_differences_in_double_precision_are_as_good() -> None:
    model, loss, batches = mlp(torch.float64)
    exact = MeanLoss(model, loss, batches)
    near = MeanLoss(model, loss, batches, differentiation="differences")
    v, before = torch.randn_like(exact.point), exact.point
    torch.testing.assert_close(near.hessian_product(v), exact.hessian_product(v), rtol=1e-6, atol=1e-7)
    assert near.product_error(v) < 1e-6
    assert torch.equal(exact.point, before)


class Once(torch.autograd.Function):
    """A square without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_a_model_without_second_derivative_needs_differences() -> None:
    model = nn.Linear(3, 1, bias=False)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    z = model(x).item()

    def loss(power: int) -> Tensor:
        once = Once.apply(model(x))
        return (once if power == 1 else once**power).sum()

    with pytest.raises(CurvatureError, match="differentiation to 'differences'"):
        MeanLoss(model, loss, [2]).hessian_product(torch.ones(3))
    by_differences = MeanLoss(model, loss, [2], differentiation="differences")
    pair = largest_eigenpair(by_differences.hessian_product, by_differences.point)
    assert pair.value == pytest.approx(12 * z**2 * 14, rel=1e-2)
    # Torch cannot tell that something is missing where the gradient that comes in is a constant: the check does.
    assert MeanLoss(model, loss, [1]).product_error(torch.ones(3)) > 1
    assert MeanLoss(model, loss, [1], differentiation="differences").product_error(torch.ones(3)) < 1e-3


@pytest.mark.parametrize("carried", [False, True])
def test_lstm(carried: bool) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "embedding_size": 4, "hidden_size": 4, "num_hidden_layers": 2}
    model = ExtrapLstmForCausalLM(ExtrapLstmConfig(**sizes, initializer_range=1.0))
    ids = torch.randint(11, (3, 7))
    labels = ids.index_fill(1, torch.tensor([3]), -100)
    state = tuple(torch.randn(2, 3, 4) for _ in range(2)) if carried else None

    def plain() -> Tensor:
        logits = model(ids[:, :-1], cache_params=state).logits
        return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:])

    dense = dense_hessian(model, plain)
    model.train()
    mean_loss = MeanLoss(model, lambda batch: model(batch, cache_params=state, labels=labels).loss, [ids, ids])
    v = torch.randn(dense.shape[0])
    torch.testing.assert_close(mean_loss.hessian_product(v), dense @ v, rtol=1e-4, atol=1e-5)
    pair = largest_eigenpair(mean_loss.hessian_product, mean_loss.point, tolerance=1e-4)
    assert pair.value == pytest.approx(largest(dense), rel=1e-4)


def test_marian() -> None:
    model, ids = marian(), torch.randint(2, 50, (3, 6))
    exact, near = (
        MeanLoss(model, lambda b: model(input_ids=b, labels=b).loss, [ids], differentiation=kind)
        for kind in ("autograd", "differences")
    )
    pair = largest_eigenpair(exact.hessian_product, exact.point, tolerance=1e-3)
    other = largest_eigenpair(near.hessian_product, exact.point, tolerance=1e-2)
    assert pair.value == pytest.approx(other.value, rel=1e-2) and pair.value > 0.1
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_batch_norm_mode_is_stated_and_leaves_the_statistics(mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(5, 1, 4, 4) * 3 + 1, torch.randint(3, (5,))
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def plain() -> Tensor:
        norm = model[1]
        seen = model[0](x)
        center = seen.mean((0, 2, 3)) if mode == "batch" else norm.running_mean
        spread = seen.var((0, 2, 3), unbiased=False) if mode == "batch" else norm.running_var
        scaled = (seen - center[:, None, None]) / (spread[:, None, None] + norm.eps).sqrt()
        hidden = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
        return F.cross_entropy(model[2:](hidden), y)

    dense = dense_hessian(model, plain)
    model.train()
    mean_loss = MeanLoss(model, lambda _: F.cross_entropy(model(x), y), [None], batch_norm=mode)
    pair = largest_eigenpair(mean_loss.hessian_product, mean_loss.point, tolerance=1e-4)
    assert pair.value == pytest.approx(largest(dense), rel=1e-4)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert model[1].training and model[1].track_running_stats


@pytest.mark.parametrize(
    ("optimizer_class", "amsgrad"), [(torch.optim.AdamW, False), (torch.optim.AdamW, True), (torch.optim.NAdam, False)]
)
def test_preconditioned_by_adam(optimizer_class: Any, amsgrad: bool) -> None:
    model, loss, batches = mlp()
    # Groups in another order than the model's.
    groups = [{"params": [p]} for p in reversed(list(model.parameters()))]
    options = {"amsgrad": True} if amsgrad else {}
    optimizer = optimizer_class(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-3, **options)
    squares = torch.zeros(sum(p.numel() for p in model.parameters()))
    largest_seen = squares.clone()
    for _ in range(3):
        optimizer.zero_grad()
        loss(batches[0]).backward()
        squares = 0.99 * squares + 0.01 * flatten(p.grad for p in model.parameters()) ** 2
        largest_seen = torch.maximum(largest_seen, squares)
        optimizer.step()
    v = largest_seen if amsgrad else squares
    expected = 1 / ((v / (1 - 0.99**3)).sqrt() + 1e-3)
    parameters = list(model.parameters())
    preconditioner = adam_preconditioner(optimizer, parameters)
    torch.testing.assert_close(preconditioner, expected, rtol=1e-4, atol=1e-4)
    mean_loss = MeanLoss(model, loss, batches)
    dense = dense_hessian(model, lambda: sum(map(loss, batches)) / 3)
    root = expected.sqrt()
    product = preconditioned(mean_loss.hessian_product, preconditioner)
    pair = largest_eigenpair(product, mean_loss.point, tolerance=1e-4)
    assert pair.value == pytest.approx(largest(root[:, None] * dense * root), rel=1e-4)


def test_other_optimizers_have_no_such_preconditioner() -> None:
    model, loss, batches = mlp()
    parameters = list(model.parameters())
    for optimizer in (torch.optim.SGD(parameters, lr=0.1, momentum=0.9), torch.optim.Adafactor(parameters)):
        assert adam_preconditioner(optimizer, parameters) is None
        loss(batches[0]).backward()
        optimizer.step()
        assert adam_preconditioner(optimizer, parameters) is None
    assert adam_preconditioner(torch.optim.Adam(parameters), parameters) is None


def test_loss_along_a_line_is_that_at_the_moved_parameters() -> None:
    model, loss, batches = mlp()
    mean_loss = MeanLoss(model, loss, batches)
    before, direction = mean_loss.point, torch.randn_like(mean_loss.point)
    values = mean_loss.along(direction, [0.0, 0.5])
    assert torch.equal(mean_loss.point, before)
    assert values[0] == pytest.approx(mean_loss.value(), abs=1e-7)
    with torch.no_grad():
        for p, d in zip(model.parameters(), split(direction, list(model.parameters())), strict=True):
            p += 0.5 * d
    assert values[1] == pytest.approx(mean_loss.value(), abs=1e-6) != pytest.approx(values[0], abs=1e-3)


def test_the_graph_of_an_only_batch_is_kept_while_the_parameters_stay() -> None:
    model, _, batches = mlp()
    calls = 0

    def loss(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(batch[0]), batch[1])

    mean_loss = MeanLoss(model, loss, batches[:1])
    v = torch.randn_like(mean_loss.point)
    first = mean_loss.hessian_product(v)
    assert torch.equal(mean_loss.hessian_product(v), first) and calls == 1
    with torch.no_grad():
        model[0].weight.add_(0.1)
    moved = mean_loss.hessian_product(v)
    assert calls == 2 and not torch.allclose(moved, first, rtol=1e-3)
    torch.testing.assert_close(moved, MeanLoss(model, loss, batches[:1]).hessian_product(v))
    several = MeanLoss(model, loss, batches[:1] * 2)
    torch.testing.assert_close(several.hessian_product(v), moved)


def test_errors_and_losses_without_curvature() -> None:
    flat = nn.Linear(3, 1)
    mean_loss = MeanLoss(flat, lambda x: flat(x).sum(), [torch.ones(2, 3)])
    assert largest_eigenpair(mean_loss.hessian_product, mean_loss.point).value == 0
    model, loss, batches = mlp()
    for fields, message in (
        ({"differentiation": "numeric"}, "allowed: autograd, differences"),
        ({"batch_norm": "none"}, "allowed: batch, running"),
        ({"batches": []}, "no batch"),
        ({"model": mlp()[0].bfloat16()}, "float32 or float64"),
    ):
        with pytest.raises(CurvatureError, match=message):
            MeanLoss(**{"model": model, "loss": loss, "batches": batches, **fields})
    with pytest.raises(CurvatureError, match="at least 2"):
        largest_eigenpair(lambda v: v, torch.ones(1))
    spread = torch.linspace(0, 1, 3000)
    with pytest.raises(CurvatureError, match="larger tolerance"):
        largest_eigenpair(lambda v: spread * v, spread, tolerance=1e-9, restarts=1)
    with torch.no_grad():
        model[0].weight.fill_(torch.inf)
    mean_loss = MeanLoss(model, loss, batches)
    with pytest.raises(CurvatureError, match="diverged"):
        largest_eigenpair(mean_loss.hessian_product, mean_loss.point)
