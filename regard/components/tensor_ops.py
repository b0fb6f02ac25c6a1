"""Tensor operations of components and backends: accumulation precision, grouped heads, log-sum-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return a tensor (...) in accumulation precision: float64 stays, other dtypes are converted to float32."""
    return x if x.dtype == torch.float64 else x.float()


def fold_heads(x: Tensor, k: Tensor) -> Tensor:
    """Stack the heads of x that share a key/value head: (b, h, l, n) -> (b, g, h/g * l, n)."""
    heads = k.shape[1]
    return x if x.shape[1] == heads else x.reshape(x.shape[0], heads, x.shape[1] // heads * x.shape[2], x.shape[3])


def expand_heads(x: Tensor, repeats: int) -> Tensor:
    """Repeat each key/value head for its query heads: (b, g, ...) -> (b, g * repeats, ...)."""
    return x if repeats == 1 else x[:, :, None].expand(-1, -1, repeats, *x.shape[2:]).flatten(1, 2)


def for_queries(k: Tensor, q: Tensor) -> Tensor:
    """Repeat the heads of k (b, g, ...) to match those of q (b, h, ...)."""
    return k if k.shape[1] == q.shape[1] else expand_heads(k, q.shape[1] // k.shape[1])


def log_sum_exp(s: Tensor) -> Tensor:
    """Return log(sum_j exp(s_j)) for s (..., S); -inf if all s_j are -inf or S is 0."""
    if not s.shape[-1]:
        return s.new_full(s.shape[:-1], -math.inf)
    # The gradient of torch.logsumexp, exp(s - result), has the rounding error of the result, which may be large.
    top = s.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top.isinf(), 0.0)
    return (s - top).exp().sum(-1).log() + top[..., 0]
