"""Operations on tensors that components and backends share: accumulation precision, heads that share keys, log-sum-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return a tensor (...) in the accumulation precision: float64 stays, every other dtype becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def fold_heads(x: Tensor, k: Tensor) -> Tensor:
    """Stack the heads of x that share a key/value head: (b, h, l, n) -> (b, g, h/g * l, n)."""
    heads = k.shape[1]
    return x if x.shape[1] == heads else x.reshape(x.shape[0], heads, x.shape[1] // heads * x.shape[2], x.shape[3])


def expand_heads(x: Tensor, repeats: int) -> Tensor:
    """Repeat each key/value head for the query heads it serves: (b, g, ...) -> (b, g * repeats, ...)."""
    return x if repeats == 1 else x[:, :, None].expand(-1, -1, repeats, *x.shape[2:]).flatten(1, 2)


def for_queries(k: Tensor, q: Tensor) -> Tensor:
    """The keys (b, g, ...) with as many heads as q (b, h, ...)."""
    return k if k.shape[1] == q.shape[1] else expand_heads(k, q.shape[1] // k.shape[1])


def log_sum_exp(s: Tensor) -> Tensor:
    """The logarithm of sum_j exp(s_j) for s (..., S); -inf where there is nothing to sum."""
    if not s.shape[-1]:
        return s.new_full(s.shape[:-1], -math.inf)
    # Not torch.logsumexp: its gradient exp(s - result) is off by as much as the result was rounded, which may be large.
    top = s.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top.isinf(), 0.0)
    return (s - top).exp().sum(-1).log() + top[..., 0]
