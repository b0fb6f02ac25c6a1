"""Memory-efficient cross entropy over a vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard import check

# Rows of logits per block: few enough for the cache, enough for an efficient matrix product.
_ROWS = 512


def cross_entropy(hidden: Tensor, table: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Compute `F.cross_entropy(hidden @ table.mT, target, label_smoothing=smoothing)` in memory linear in N and V.

    Logits are computed in blocks of rows, and are used for the loss and for both gradients at once. This takes the same
    three matrix products as a computation that saves all logits, with a fraction of the memory traffic. Under autocast,
    matrix products are in its dtype.

    >>> hidden, table, target = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 3, 6, 2, 1])
    >>> loss = cross_entropy(hidden, table, target, smoothing=0.1)
    >>> torch.allclose(loss, F.cross_entropy(hidden @ table.mT, target, label_smoothing=0.1))
    True

    Args:
        hidden: (N, width).
        table: (V, width), the embedding of each token of the vocabulary.
        target: (N,), target tokens, integers from 0 to V - 1.
        smoothing: label smoothing, the fraction of the target distribution that is uniform over the vocabulary.

    Returns:
        The mean loss over the N rows, a scalar of dtype float64 for float64 input and float32 otherwise. It is
        differentiable once.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7, for
        smoothing;
    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), for not materializing the logits.
    """
    if not check.is_float_tensor(hidden) or hidden.dim() != 2:
        raise check.error(
            "cross_entropy: hidden", hidden, "a float tensor of shape (N, width)", check.is_float_tensor(hidden)
        )
    if not check.is_float_tensor(table) or table.dim() != 2 or table.shape[1] != hidden.shape[1]:
        expected = f"a float tensor of shape (V, {hidden.shape[1]}), as wide as hidden"
        raise check.error("cross_entropy: table", table, expected, check.is_float_tensor(table))
    if not check.is_integer_tensor(target) or target.shape != hidden.shape[:1]:
        expected = f"an integer tensor of shape ({hidden.shape[0]},), one token per row of hidden"
        raise check.error("cross_entropy: target", target, expected, check.is_integer_tensor(target))
    if not check.is_number(smoothing) or not 0.0 <= smoothing <= 1.0:
        raise check.error("cross_entropy: smoothing", smoothing, "a number from 0 to 1", check.is_number(smoothing))
    loss: Tensor = _CrossEntropy.apply(hidden, table, target, smoothing)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, target: Tensor, smoothing: float) -> Tensor:
        device, needs_grad = hidden.device.type, any(ctx.needs_input_grad[:2])
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        total = hidden.new_zeros((), dtype=torch.float64)
        grads = [torch.zeros_like(x) for x in (hidden, table)] if needs_grad else []
        with torch.autocast(device, enabled=False):
            weight = table.to(dtype)
            for first in range(0, len(hidden), _ROWS):
                rows, labels = hidden[first : first + _ROWS].to(dtype), target[first : first + _ROWS, None]
                logits = rows @ weight.mT
                # Sums over the vocabulary need float32.
                logits = logits if dtype == torch.float64 else logits.float()
                top = logits.amax(-1, keepdim=True)
                expected = (1 - smoothing) * logits.gather(1, labels) + smoothing * logits.mean(-1, keepdim=True)
                exps = logits.sub_(top).exp_()
                sums = exps.sum(-1, keepdim=True)
                total += (top + sums.log() - expected).sum()
                if needs_grad:
                    dlogits = exps.div_(sums).sub_(smoothing / len(table))
                    dlogits = dlogits.scatter_add_(1, labels, dlogits.new_full(labels.shape, smoothing - 1)).to(dtype)
                    grads[0][first : first + _ROWS] = dlogits @ weight
                    grads[1] += dlogits.mT @ rows
        ctx.save_for_backward(*grads)
        ctx.rows = len(hidden)
        mean: Tensor = (total / len(hidden)).to(hidden.dtype if hidden.dtype == torch.float64 else torch.float32)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        return *((grad * (dout / ctx.rows) if needed else None) for grad, needed in grads), None, None
