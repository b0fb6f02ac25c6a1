"""Entmax whose order alpha is any number > 1, or a tensor that may be learned.

With beta = alpha - 1, p_j = max(0, beta s_j - tau)^(1 / beta). On the support, with g_j = p_j^(2 - alpha) and
h_j = -p_j log p_j:

    dp_i / ds_j = g_i (delta_ij - g_j / G)                                      G = sum_j g_j
    dp_i / dalpha = h_i / beta + p_i / beta^2 - g_i / G (sum_j h_j / beta + 1 / beta^2)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.tracing import has_values, is_tracing

# Steps where values are unknown, so that none can be the last one; up to 25 were observed.
_STEPS = 40


def entmax(s: Tensor, alpha: Tensor) -> Tensor:
    """Return the weights of scores (..., S), with -inf for masked pairs and one finite score per row.

    Args:
        alpha: orders, which broadcast to (..., 1).
    """
    alpha = alpha.to(s.dtype)
    if is_tracing():  # graphs of torch.jit and ONNX hold no Python functions
        return _solve(s, alpha)
    function = _Entmax if torch.compiler.is_compiling() else _TransformedEntmax
    p: Tensor = function.apply(s, alpha)  # type: ignore[no-untyped-call]
    return p


class _Entmax(torch.autograd.Function):
    """The derivatives are differentiable functions of the result p and alpha, which gives derivatives of any order."""

    @staticmethod
    def forward(s: Tensor, alpha: Tensor) -> Tensor:
        return _solve(s, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])
        ctx.save_for_forward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, alpha = ctx.saved_tensors
        by_score = times_score_jacobian(p, alpha, grad) if ctx.needs_input_grad[0] else None
        by_alpha = (_alpha_derivative(p, alpha) * grad).sum_to_size(alpha.shape) if ctx.needs_input_grad[1] else None
        return by_score, by_alpha


class _TransformedEntmax(_Entmax):
    """`_Entmax` with the rules of torch.func, which torch.compile cannot trace."""

    @staticmethod
    def jvp(ctx: Any, s_tangent: Tensor | None, alpha_tangent: Tensor | None) -> Tensor:
        p, alpha = ctx.saved_tensors
        tangent = torch.zeros_like(p) if s_tangent is None else times_score_jacobian(p, alpha, s_tangent)
        return tangent if alpha_tangent is None else tangent + _alpha_derivative(p, alpha) * alpha_tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], s: Tensor, alpha: Tensor) -> tuple[Tensor, int]:
        rank = max(x.dim() - (d is not None) for x, d in zip((s, alpha), in_dims, strict=True))
        batched = []
        for x, d in zip((s, alpha), in_dims, strict=True):
            x = x[None] if d is None else x.movedim(d, 0)
            batched.append(x.view(x.shape[0], *[1] * (rank + 1 - x.dim()), *x.shape[1:]))
        batched[0] = batched[0].expand(info.batch_size, *batched[0].shape[1:])
        return _TransformedEntmax.apply(*batched), 0  # type: ignore[no-untyped-call]


def _on_support(p: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return p with 1 for weights of 0, and g."""
    support = p > 0
    positive = torch.where(support, p, 1.0)
    return positive, positive ** (2 - alpha) * support


def times_score_jacobian(p: Tensor, alpha: float | Tensor, direction: Tensor) -> Tensor:
    """Return the product of a vector with the Jacobian by the scores, which is symmetric."""
    _, g = _on_support(p, alpha)
    product: Tensor = g * (direction - (g * direction).sum(-1, keepdim=True) / g.sum(-1, keepdim=True))
    return product


def _alpha_derivative(p: Tensor, alpha: Tensor) -> Tensor:
    positive, g = _on_support(p, alpha)
    beta, h = alpha - 1, -p * positive.log()
    share = g / g.sum(-1, keepdim=True)
    return (h - share * h.sum(-1, keepdim=True)) / beta + (p - share) / beta**2


def _solve(s: Tensor, alpha: Tensor) -> Tensor:
    """Find tau, where f(tau) = sum_j max(0, z_j - tau)^(1 / beta) - 1 = 0 with z = beta (s - max s), by Newton's method
    within a shrinking bracket; in float64, since small beta magnify rounding.

    f is decreasing. At -1 the largest element alone gives f >= 0, and at 0 f is -1. It is convex for alpha <= 2; for larger
    alpha it is not, and a step that leaves the bracket is replaced by its middle.
    """
    beta = (alpha - 1).double()
    power = 1 / beta
    z = beta * (s.double() - s.double().amax(-1, keepdim=True))
    low = torch.full_like(z[..., :1], -1.0)
    high, tau = torch.zeros_like(low), low.clone()
    can_stop = has_values(z, beta)
    for _ in range(200 if can_stop else _STEPS):
        gap = (z - tau).clamp(min=0)
        p = gap**power
        f = p.sum(-1, keepdim=True) - 1
        slope = power * torch.where(gap > 0, p / gap, 0.0).sum(-1, keepdim=True)
        low, high = torch.where(f >= 0, tau, low), torch.where(f < 0, tau, high)
        moved = tau + f / slope
        moved = torch.where((moved >= low) & (moved <= high), moved, (low + high) / 2)
        if can_stop and not bool(((moved - tau).abs() > 4e-16).any()):
            break
        tau = moved
    p = (z - tau).clamp(min=0) ** power
    p = p / p.sum(-1, keepdim=True)
    return torch.where(beta > 0, p, torch.nan).to(s.dtype)
