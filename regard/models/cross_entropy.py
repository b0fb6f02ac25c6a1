"""Cross entropy over a vocabulary, without the scores of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard import check

# So many rows of scores are there at a time: few enough for a cache, enough for a product.
_ROWS = 512


def cross_entropy(hidden: Tensor, table: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """What `F.cross_entropy(hidden @ table.mT, target, label_smoothing=smoothing)` gives, in memory linear in N and V.

    The scores are made, used for the loss and for both gradients, and forgotten, some rows at a time: three products, as
    when they are kept, but a fraction of the reads and writes. Under autocast, the products are in its dtype.

    Args:
        hidden: (N, width).
        table: (V, width), a row for each token of the vocabulary.
        target: (N,) integers from 0 to V - 1: the tokens that should be.
        smoothing: of the labels: this share of each is spread over the vocabulary.

    Returns:
        The mean over the N rows, a scalar, in float64 where hidden is and float32 otherwise; it can be differentiated once.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7, for smoothing;
    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), for not keeping the scores.
    """
    if not check.is_floats(hidden) or hidden.dim() != 2:
        raise check.wrong("cross_entropy: hidden", hidden, "floats of shape (N, width)", check.is_floats(hidden))
    if not check.is_floats(table) or table.dim() != 2 or table.shape[1] != hidden.shape[1]:
        expected = f"floats of shape (V, {hidden.shape[1]}), as wide as hidden"
        raise check.wrong("cross_entropy: table", table, expected, check.is_floats(table))
    if not check.is_ints(target) or target.shape != hidden.shape[:1]:
        expected = f"integers of shape ({hidden.shape[0]},), a token for each row of hidden"
        raise check.wrong("cross_entropy: target", target, expected, check.is_ints(target))
    if not check.is_number(smoothing) or not 0.0 <= smoothing <= 1.0:
        raise check.wrong("cross_entropy: smoothing", smoothing, "a number from 0 to 1", check.is_number(smoothing))
    loss: Tensor = _CrossEntropy.apply(hidden, table, target, smoothing)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, target: Tensor, smoothing: float) -> Tensor:
        device, wanted = hidden.device.type, any(ctx.needs_input_grad[:2])
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        total = hidden.new_zeros((), dtype=torch.float64)
        pulls = [torch.zeros_like(x) for x in (hidden, table)] if wanted else []
        with torch.autocast(device, enabled=False):
            words = table.to(dtype)
            for first in range(0, len(hidden), _ROWS):
                rows, own = hidden[first : first + _ROWS].to(dtype), target[first : first + _ROWS, None]
                scores = rows @ words.mT
                # Sums over a vocabulary are not for half precision.
                scores = scores if dtype == torch.float64 else scores.float()
                top = scores.amax(-1, keepdim=True)
                aim = (1 - smoothing) * scores.gather(1, own) + smoothing * scores.mean(-1, keepdim=True)
                chances = scores.sub_(top).exp_()
                sums = chances.sum(-1, keepdim=True)
                total += (top + sums.log() - aim).sum()
                if wanted:
                    slopes = chances.div_(sums).sub_(smoothing / len(table))
                    slopes = slopes.scatter_add_(1, own, slopes.new_full(own.shape, smoothing - 1)).to(dtype)
                    pulls[0][first : first + _ROWS] = slopes @ words
                    pulls[1] += slopes.mT @ rows
        ctx.save_for_backward(*pulls)
        ctx.rows = len(hidden)
        mean: Tensor = (total / len(hidden)).to(hidden.dtype if hidden.dtype == torch.float64 else torch.float32)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        return *((x * (given / ctx.rows) if needed else None) for x, needed in wanted), None, None
