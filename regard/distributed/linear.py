"""Linear maps between ranks, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def linear(x: Tensor, forward: Map, adjoint: Map) -> Tensor:
    """Return forward(x), a linear map whose backward pass is its adjoint, which is differentiable by `forward` in turn.

    >>> from regard.distributed.linear import linear
    >>> x = torch.ones(2, requires_grad=True)
    >>> linear(x, lambda y: 2 * y, lambda y: 2 * y).sum().backward()
    >>> x.grad
    tensor([2., 2.])
    """
    result: Tensor = _Linear.apply(x, forward, adjoint)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Map, adjoint: Map) -> Tensor:
        ctx.maps = adjoint, forward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return linear(grad, *ctx.maps), None, None
