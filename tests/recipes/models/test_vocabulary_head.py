"""The fused head against a projection followed by cross entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_extrap.recipes.models import vocabulary_head
from hf_extrap.recipes.models.vocabulary_head import VocabularyHead


def head_and_batch(targets: list[int], vocab_size: int = 50) -> tuple[VocabularyHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = VocabularyHead(16, vocab_size)
    return head, torch.randn(len(targets), 16, requires_grad=True), torch.tensor(targets)


def gradients(head: VocabularyHead, hidden: torch.Tensor, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [hidden, head.weight, head.bias]))


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("ignored", [False, True])
def test_equals_naive_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk_rows: int, ignored: bool) -> None:
    monkeypatch.setitem(vocabulary_head.CHUNK_ELEMENTS, "cpu", 50 * chunk_rows)
    head, hidden, targets = head_and_batch([3, 49, 0, -100 if ignored else 7, 3, 11, -100 if ignored else 1])
    loss, losses = head(hidden, targets)
    logits = head(hidden)
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), atol=1e-5, rtol=1e-5)
    # A factor on the loss, as from accumulation or a loss scale, reaches every gradient.
    for own, naive in zip(gradients(head, hidden, 3 * loss), gradients(head, hidden, 3 * expected), strict=True):
        torch.testing.assert_close(own, naive, atol=1e-5, rtol=1e-5)


def test_losses_under_autocast_and_without_gradients() -> None:
    head, hidden, targets = head_and_batch(list(range(40)))
    exact = head(hidden, targets)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head(hidden, targets)[0]
    assert rounded.dtype == torch.float32
    assert abs(rounded.item() - exact.item()) < 0.01
    for own, expected in zip(gradients(head, hidden, rounded), gradients(head, hidden, exact), strict=True):
        assert own.dtype == torch.float32
        assert (own - expected).norm() < 0.02 * expected.norm()
    head, hidden, targets = head_and_batch([3, 49, 0, -100])
    with torch.no_grad():
        loss, losses = head(hidden, targets)
    torch.testing.assert_close(losses, head(hidden, targets)[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss, losses.sum() / 3)


def test_large_logits_no_target_frozen_weights_and_a_second_backward() -> None:
    head, hidden, targets = head_and_batch([3, 4])
    loss, _ = head(hidden * 1e4, targets)
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden * 1e4), targets))
    head, hidden, targets = head_and_batch([-100, -100])
    loss, _ = head(hidden, targets)
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(head, hidden, loss))
    head, hidden, targets = head_and_batch([3, 4])
    head.requires_grad_(False)
    loss, _ = head(hidden, targets)
    own = torch.autograd.grad(loss, hidden)[0]
    torch.testing.assert_close(own, torch.autograd.grad(F.cross_entropy(head(hidden), targets), hidden)[0])
    head, hidden, targets = head_and_batch([3, 4])
    loss, _ = head(hidden, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
