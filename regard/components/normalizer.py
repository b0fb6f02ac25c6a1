"""Normalizers: from the scores of a row to its weights.

Each takes scores s (..., S), -inf where a pair may not attend, at least one of them finite, and gives weights of the
same shape, 0 where s is -inf. Sums run over the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard import check
from regard.components.tensor_ops import log_sum_exp
from regard.components.tile import Sizes, Tile


@dataclass(frozen=True)
class Normalizer:
    """What all normalizers share."""

    def weights(self, s: Tensor, tile: Tile) -> Tensor:
        """The weights of rows of scores (b, h, l, s); every row is whole, but for keys that it may not attend."""
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Raise a ValueError where a parameter does not fit the problem."""

    @classmethod
    def example(cls, heads: int) -> Normalizer:
        """One of these with random parameters, for tests and benchmarks."""
        return cls()


@dataclass(frozen=True)
class Softmax(Normalizer):
    """p_j = exp(s_j) / (sum_j exp(s_j) + exp(sink)).

    Args:
        sink: the score of an extra key whose value is 0: None for none, a number, or a tensor of shape () or (H,),
            learned if you like. 0 is "softmax off by one".

    Source: Miller, "Attention Is Off By One" (2023); learned per head in OpenAI, "gpt-oss" (2025).
    """

    sink: float | Tensor | None = None

    def weights(self, s: Tensor, tile: Tile) -> Tensor:
        p = _simplex(s, 1.0)
        if self.sink is None:
            return p
        # What the keys get of the whole: e^lse / (e^lse + e^sink). By its logarithm, whose gradient is the share of the
        # sink; that of the sigmoid has 1 - (1 - share) in its place, and a small share would be lost in rounding.
        return p * torch.nn.functional.logsigmoid(log_sum_exp(s)[..., None] - self._sink(s, tile)).exp()

    def total(self, lse: Tensor, tile: Tile) -> Tensor:
        """The log-sum-exp (b, h, l) with the sink in it."""
        if self.sink is None:
            return lse
        return torch.logaddexp(lse, self._sink(lse, tile).expand(*lse.shape, 1)[..., 0])

    def _sink(self, like: Tensor, tile: Tile) -> Tensor:
        if isinstance(self.sink, Tensor):
            return tile.cut_heads(self.sink).to(like.dtype)
        return torch.full((), self.sink, dtype=like.dtype, device=like.device)  # type: ignore[arg-type]

    def check(self, sizes: Sizes) -> None:
        if self.sink is not None:
            check.per_head("normalizer: sink", self.sink, sizes.H)

    @classmethod
    def example(cls, heads: int) -> Normalizer:
        return cls(torch.randn(heads))


@dataclass(frozen=True)
class Sigmoid(Normalizer):
    """p_j = 1 / (1 + exp(-(s_j + bias))): each key is weighed on its own, and weights need not sum to 1.

    Args:
        bias: a number, or a tensor of shape () or (H,). The paper recommends -log(S).

    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (2024), equation 3.
    """

    bias: float | Tensor = 0.0

    def weights(self, s: Tensor, tile: Tile) -> Tensor:
        if isinstance(self.bias, Tensor):
            return torch.sigmoid(s + tile.cut_heads(self.bias).to(s.dtype))
        return torch.sigmoid(s + self.bias if self.bias else s)

    def check(self, sizes: Sizes) -> None:
        check.per_head("normalizer: bias", self.bias, sizes.H)

    @classmethod
    def example(cls, heads: int) -> Normalizer:
        return cls(torch.randn(heads))


@dataclass(frozen=True)
class Entmax(Normalizer):
    """p = argmax over the simplex of p.s + the Tsallis entropy of order alpha: sparse, between softmax (alpha -> 1)
    and sparsemax (alpha = 2). p_j = max(0, (alpha - 1) s_j - tau)^(1 / (alpha - 1)), tau such that p sums to 1.

    Args:
        alpha: 1 < alpha <= 2.

    Source: Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models" (2019), equation 4.
    """

    alpha: float = 1.5

    def weights(self, s: Tensor, tile: Tile) -> Tensor:
        return _simplex(s, self.alpha)

    def check(self, sizes: Sizes) -> None:
        if not check.is_number(self.alpha) or not 1.0 < self.alpha <= 2.0:
            expected = "a number with 1 < alpha <= 2"
            raise check.wrong("normalizer: alpha", self.alpha, expected, check.is_number(self.alpha))


@dataclass(frozen=True)
class Sparsemax(Normalizer):
    """p = the point of the simplex nearest to s; Entmax with alpha = 2.

    Source: Martins, Astudillo, "From Softmax to Sparsemax" (2016), equation 2.
    """

    def weights(self, s: Tensor, tile: Tile) -> Tensor:
        return Entmax(2.0).weights(s, tile)


class _Simplex(torch.autograd.Function):
    """Softmax (alpha = 1) and its kin (alpha up to 2), whose Jacobian is diag(g) - g g^T / sum(g), g = p^(2 - alpha) on
    the support. The gradient is written in terms of the result p, so derivatives of every order follow from it.
    """

    @staticmethod
    def forward(s: Tensor, alpha: float) -> Tensor:
        return _softmax(s) if alpha == 1 else _entmax(s, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.alpha = inputs[1]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def _apply_jacobian(ctx: Any, direction: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        if ctx.alpha == 1:
            gradient: Tensor = torch._softmax_backward_data(direction, p, -1, p.dtype)
            return gradient
        support = p > 0
        g = support.to(p.dtype) if ctx.alpha == 2 else torch.where(support, p, 1.0) ** (2 - ctx.alpha) * support
        mean = (g * direction).sum(-1, keepdim=True) / g.sum(-1, keepdim=True)
        product: Tensor = g * (direction - mean)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Simplex._apply_jacobian(ctx, grad), None


class _Transformed(_Simplex):
    """The same with what torch.func asks for, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Simplex._apply_jacobian(ctx, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], s: Tensor, alpha: float) -> tuple[Tensor, int]:
        return _Transformed.apply(s.movedim(in_dims[0], 0), alpha), 0  # type: ignore[no-untyped-call]


def _simplex(s: Tensor, alpha: float) -> Tensor:
    function = _Simplex if torch.compiler.is_compiling() else _Transformed
    p: Tensor = function.apply(s, alpha)  # type: ignore[no-untyped-call]
    return p


def _softmax(s: Tensor) -> Tensor:
    # Weights that are nothing beside the largest of their row (1e-31 of 1 in float32) are set to 0: products of
    # subnormal numbers, which steep biases make by the thousand, run fifty times slower.
    limits = torch.finfo(s.dtype)
    return torch.threshold(torch.softmax(s, -1), limits.tiny / limits.eps, 0.0)


def _entmax(s: Tensor, alpha: float) -> Tensor:
    # Newton's method on f(tau) = |p(tau)^(alpha - 1)| - 1, the norm of order 1 / (alpha - 1). It is convex and falling,
    # so that from the left, where f >= 0, a step never passes the root; and nearly straight, so that 5 to 8 steps do
    # where the sum of p takes 10 to 14. At tau = max - 1 the largest entry alone gives f >= 0.
    z = (alpha - 1) * (s - s.amax(-1, keepdim=True))
    power = 1 / (alpha - 1)
    tau = torch.full_like(z[..., :1], -1.0)
    # A graph that is compiled cannot stop early; no row was ever seen to take more than 10 steps.
    for left in reversed(range(16 if torch.compiler.is_compiling() else 100)):
        gap = (z - tau).clamp_(min=0)
        p = gap if power == 1 else gap**power
        slope = (gap > 0).to(z.dtype) if power == 1 else gap if power == 2 else gap ** (power - 1)
        total = p.sum(-1, keepdim=True)
        step = (total ** (alpha - 1) - 1) * total ** (2 - alpha) / slope.sum(-1, keepdim=True)
        # Rounding makes the last steps tiny and of either sign: stop when none moves tau.
        moved = tau + step.clamp(min=0)
        if not left or not (torch.compiler.is_compiling() or bool((moved > tau).any())):
            break
        tau = moved
    # The last step, of either sign, is taken by the weights themselves. tau is rounded, which all of them have in common:
    # a thousand small ones may be off by a thousand times that, and the division would put it upon the large one.
    gap = (z - tau - step).clamp_(min=0)
    p = gap if power == 1 else gap**power
    return p / p.sum(-1, keepdim=True)


# Every normalizer by name: tests, benchmarks, the command line and the documentation loop over this table.
_NORMALIZERS: dict[str, type[Normalizer]] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "sparsemax": Sparsemax,
    "entmax": Entmax,
}
