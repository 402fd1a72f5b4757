"""The output layer of a language model with a large vocabulary, fused with its cross entropy.

The logits (tokens × vocabulary) are computed chunk by chunk into one buffer, and the gradients while a chunk is in the
cache, as in Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
#: Logits of a chunk: few enough for the last-level cache of a CPU, and enough to occupy a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}


class VocabularyHead(nn.Linear):
    """Linear layer that returns logits or, given targets, losses."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Any:
        """Compute logits, or the cross entropy of the targets.

        Args:
            hidden: (..., hidden_size).
            targets: (...) int64, the id that each position must predict; -100 is ignored.

        Returns:
            Without targets the logits (..., vocab_size). With targets a pair: the mean loss (scalar, fp32; 0 if all
            targets are ignored) and the loss of each target (...), fp32, detached, 0 where ignored.
        """
        if targets is None:
            return super().forward(hidden)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        flat = targets.reshape(-1)
        with torch.autocast(device, enabled=False):
            loss, losses = _ChunkedCrossEntropy.apply(
                hidden.reshape(len(flat), -1).to(dtype), self.weight, self.bias, flat, dtype
            )
        return loss, losses.view(targets.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of linear(hidden, weight, bias); the gradients are computed in the forward pass.

    With `create_graph` they are computed again, by differentiable operations.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        count, vocab_size = len(targets), len(weight)
        counted = targets != IGNORED
        labels = targets.clamp(min=0)
        total = counted.sum().clamp(min=1)
        losses = torch.zeros(count, dtype=torch.float32, device=hidden.device)
        w = weight.to(dtype)
        b = bias.to(dtype)
        # Zeros in place of ignored rows.
        masked = hidden * counted.unsqueeze(1)
        ones = counted.to(dtype)

        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None

        size = min(max(CHUNK_ELEMENTS.get(hidden.device.type, 1 << 25) // vocab_size, 1), max(count, 1))
        buffer = hidden.new_empty(size, vocab_size)
        probabilities = torch.empty_like(buffer) if any(ctx.needs_input_grad) else None
        product = torch.empty_like(w) if need_weight else None
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            h, label = hidden[rows], labels[rows].unsqueeze(1)
            logits = buffer[: len(h)]
            torch.addmm(b, h, w.t(), out=logits)
            chosen = logits.gather(1, label).squeeze(1).float()
            if probabilities is None:
                losses[rows] = torch.logsumexp(logits.float(), 1) - chosen
                continue
            p = torch.softmax(logits, 1, out=probabilities[: len(h)])
            # log-sum-exp = largest logit - log(its probability), without another exponential.
            losses[rows] = logits.amax(1).float() - p.amax(1).float().log() - chosen
            p[torch.arange(len(h), device=p.device), label.squeeze(1)] -= 1
            if grad_hidden is not None:
                torch.mm(p, w, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += torch.mm(p.t(), masked[rows], out=product)
            if grad_bias is not None:
                grad_bias += torch.mv(p.t(), ones[rows])

        if grad_hidden is not None:
            grad_hidden *= ones.unsqueeze(1)
        losses *= counted
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, total, hidden, weight, bias, targets)
        ctx.spent = False
        ctx.mark_non_differentiable(losses)
        return losses.sum() / total, losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass; run the forward pass again.")
        grad_hidden, grad_weight, grad_bias, total, hidden, weight, bias, targets = ctx.saved_tensors
        scale = grad_loss / total
        if torch.is_grad_enabled():
            return (*_differentiable_gradients(hidden, weight, bias, targets, scale), None, None)
        ctx.spent = True
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.mul_(scale).to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _differentiable_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of scale times the sum of the losses, by operations that autograd can differentiate."""
    counted = targets != IGNORED
    w = weight.to(hidden.dtype)
    logits = F.linear(hidden, w, bias.to(hidden.dtype))
    errors = torch.softmax(logits, 1) - F.one_hot(targets.clamp(min=0), len(weight))
    errors = errors * (counted.unsqueeze(1) * scale).to(hidden.dtype)
    return errors @ w, (errors.t() @ hidden).to(weight.dtype), errors.sum(0).to(bias.dtype)
