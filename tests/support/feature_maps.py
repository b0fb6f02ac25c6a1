"""Comparisons and reference attention for the tests of `regard.nn.vision`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

B, C, H, W = 3, 8, 5, 7


def shaken(layer: nn.Module) -> nn.Module:
    """Convert to float64 and perturb the parameters, so that none has its initial value."""
    for parameter in layer.double().parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return layer


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() <= 1e-12 * max(expected.abs().max().item(), 1.0)


def same(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Assert that outputs, and gradients for a random output gradient, are equal up to rounding."""
    close(got, expected)
    dout = torch.randn_like(expected)
    gradients = (torch.autograd.grad(out, inputs, dout) for out in (got, expected))
    for mine, theirs in zip(*gradients, strict=True):
        close(mine, theirs)


def softmax_of(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(D) + bias) v of tokens (B, L, heads D), head by head."""
    parts = []
    for h, (a, b, c) in enumerate(zip(*(x.chunk(heads, -1) for x in (q, k, v)), strict=True)):
        scores = a @ b.mT / a.shape[-1] ** 0.5
        parts.append(torch.softmax(scores if bias is None else scores + bias[h], -1) @ c)
    return torch.cat(parts, -1)


def image(y: Tensor, height: int, width: int) -> Tensor:
    return y.mT.reshape(y.shape[0], -1, height, width)


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C), position by position."""
    return torch.stack([x[:, :, r, c] for r in range(x.shape[2]) for c in range(x.shape[3])], 1)
