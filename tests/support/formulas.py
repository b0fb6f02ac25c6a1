"""Comparisons, and the formulas of additive and Luong attention, for the tests of layers with a memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Assert equality up to rounding, relative to the largest element."""
    scale = max([1.0, *[x.detach().abs().max().item() for x in expected if x.numel()]])
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert (x - y).abs().max() <= 1e-12 * scale


def same(got: Sequence[Tensor], expected: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Assert that outputs, and gradients for random output gradients, are equal up to rounding."""
    close(got, expected)
    douts = [torch.randn_like(x) for x in expected]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    close(*([*torch.autograd.grad(outs, leaves, douts, **options)] for outs in (got, expected)))


def lengths_allow(n: Tensor, L: int, S: int) -> Tensor:
    """Return which keys are within the lengths, (B, L, S)."""
    return (torch.arange(S) < n[:, None])[:, None].expand(-1, L, -1)


def softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Return the softmax over the allowed keys of each row; 0 if there is none."""
    rows = []
    for row, may in zip(scores.flatten(0, -2), allowed.flatten(0, -2), strict=True):
        e = torch.where(may, (row - row.detach()[may].max() if may.any() else row).exp(), 0.0)
        rows.append(e / e.sum() if may.any() else e * 0)
    return torch.stack(rows).view(scores.shape)


def additive(layer: Any, query: Tensor, key: Tensor, more: Tensor | None = None) -> Tensor:
    """Return scores (B, L, S) of Bahdanau et al. (2015). `more` (B, S, width) is added to the hidden layer."""
    W, U, v, b = layer.query_map.weight, layer.key_map.weight, layer.v, layer.query_map.bias
    rows = []
    for i, q in enumerate(query):
        row = [[W @ one + U @ k + (0 if b is None else b) for k in key[i]] for one in q]
        hidden = torch.stack([torch.stack(part) for part in row]) + (0 if more is None else more[i])
        rows.append(torch.tanh(hidden) @ v)
    return torch.stack(rows)


def luong(layer: Any, query: Tensor, key: Tensor) -> Tensor:
    """Return scores (B, L, S) of Luong et al. (2015), equation 8."""
    if layer.score == "concat":
        return additive(layer, query, key)
    W = torch.eye(key.shape[-1], dtype=key.dtype) if layer.score == "dot" else layer.query_map.weight.T
    return torch.stack([
        torch.stack([torch.stack([q @ (W @ k) for k in ks]) for q in qs]) for qs, ks in zip(query, key, strict=True)
    ])  # fmt: skip


def luong_weights(layer: Any, query: Tensor, key: Tensor, n: Tensor, start: int = 0) -> Tensor:
    """Return the weights (B, L, S) of the values."""
    scores, allowed = luong(layer, query, key), lengths_allow(n, query.shape[1], key.shape[1]).clone()
    gaussian = torch.ones_like(scores).detach()
    for b in range(len(query)):
        for i in range(query.shape[1]):
            for j in range(key.shape[1]):
                if layer.local == "monotonic":
                    allowed[b, i, j] &= start + i - layer.reach <= j <= start + i + layer.reach
                if layer.local == "predictive":
                    p = predicted_center(layer, query[b, i], int(n[b]))
                    allowed[b, i, j] &= bool(p - layer.reach <= j <= p + layer.reach)
                    gaussian[b, i, j] = torch.exp(-((j - p) ** 2) / (2 * (layer.reach / 2) ** 2))
    return softmax(scores, allowed) * gaussian


def predicted_center(layer: Any, query: Tensor, length: int) -> Tensor:
    """Return p of Luong et al. (2015), equation 9."""
    return length * torch.sigmoid(layer.position_v @ torch.tanh(layer.position_map.weight @ query))


def shaken(layer: nn.Module) -> Any:
    """Convert to float64 and perturb the parameters, so that none is 0."""
    for parameter in layer.double().parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return layer
