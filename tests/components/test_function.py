"""Components that are Python functions: gradients of what they close over, and sizes of the tiles they get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard import Summary, mask, score

_B, _H, _G, _L, _S, _D = 2, 4, 2, 31, 47, 6


def _qkv(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((_B, _H, _L, _D), (_B, _G, _S, _D), (_B, _G, _S, _D))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _table_bias(table: Tensor) -> Any:
    """A bias of head and distance, and the tensor (1, H, L, S) that it stands for."""
    i, j = torch.arange(_L)[:, None], torch.arange(_S)
    return lambda batch, head, query, key: table[head, query - key + _S], table[:, i - j + _S][None]


@pytest.mark.parametrize("backend", ["tiled", "reference", None])
def test_bias_function_equals_tensor(backend: str | None) -> None:
    x, table = _qkv(), torch.randn(_H, _L + _S + 1, dtype=torch.float64, requires_grad=True)
    function, tensor = _table_bias(table)
    arguments: dict[str, Any] = {"mask": mask.causal("end"), "softcap": 2.0, "summary": Summary(entropy=True, lse=True)}
    results = []
    for bias in (function, tensor):
        out, stats = regard.attention(*x, bias=bias, backend=backend, **arguments)
        loss = out.square().sum() + stats.entropy.sum()
        results.append([out, stats.lse, *torch.autograd.grad(loss, [*x, table])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_bias_function_has_second_derivatives() -> None:
    x, rate = (
        [y[:1, :2, :5].detach().requires_grad_() for y in _qkv()],
        torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
    )

    def call(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return regard.attention(q, k, v, bias=lambda b, h, i, j: -rate * (i - j).abs() * (h + 1 + b))

    assert torch.autograd.gradgradcheck(call, (*x, rate))


def test_functions_that_close_over_the_same_tensor() -> None:
    x, rate = _qkv(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    i, j = torch.arange(_L)[:, None], torch.arange(_S)
    out = regard.attention(*x, score=lambda q, k: rate * (q @ k.mT), bias=lambda b, h, i, j: rate * (i - j))
    expected = regard.attention(rate * x[0], *x[1:], score=score.Dot(), bias=rate * (i - j))
    for got, want in zip(*(torch.autograd.grad(y.cos().sum(), [*x, rate]) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, want)


def test_bias_function_under_transforms() -> None:
    q, k, v = _qkv()

    def loss(rate: Tensor) -> Tensor:
        return regard.attention(q, k, v, bias=lambda b, h, i, j: -rate * (i - j).abs()).square().sum()

    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(loss(rate), rate)
    with pytest.warns(UserWarning, match="the bias closes over a tensor that torch.func differentiates"):
        torch.testing.assert_close(torch.func.grad(loss)(rate.detach()), expected)


def test_bias_function_broadcasts_over_leading_dimensions() -> None:
    q, k = torch.randn(3, _L, _D), torch.randn(3, _S, _D)
    out = regard.attention(q, k, k, bias=lambda b, h, i, j: 0.1 * (b - j).float())
    expected = regard.attention(q, k, k, bias=0.1 * (torch.arange(3)[:, None, None] - torch.arange(_S)).float())
    torch.testing.assert_close(out, expected)


def test_function_of_all_heads_gets_all_heads() -> None:
    """Also where one row of all keys and heads fills a block of `tiled`."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 8, 70, 4, dtype=torch.float64), torch.randn(1, 8, 9000, 4, dtype=torch.float64)
    weight = torch.randn(8, 1, 4, dtype=torch.float64, requires_grad=True)
    out = regard.attention(q, k, k, score=lambda q, k: (q * weight) @ k.mT)
    expected = regard.attention(q * weight, k, k, score=score.Dot())
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(x.square().sum(), weight)[0] for x in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
