"""Normalizers: from the scores of a row to its attention weights.

A normalizer takes scores s (..., S), -inf for masked pairs and at least one of them finite, and returns weights of the
same shape, which are 0 where s is -inf. It normalizes over the last dimension. Dropout is applied to its result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard import check
from regard.components.learned_entmax import entmax, times_score_jacobian
from regard.components.tensor_ops import log_sum_exp
from regard.components.tile import Sizes, Tile
from regard.tracing import has_values, is_tracing


@dataclass(frozen=True)
class Normalizer:
    """Base class of normalizers."""

    # Whether `check` depends on the lengths L and S: then plans are cached per length.
    depends_on_lengths = False

    def weights(self, s: Tensor, tile: Tile) -> Tensor:
        """Return the weights of scores (b, h, l, s). Rows are complete: s may leave out masked keys only."""
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Raise a ValueError if a parameter does not fit the problem."""

    @classmethod
    def example(cls, heads: int) -> Normalizer:
        """Return a normalizer with random parameters, for tests and benchmarks."""
        return cls()


@dataclass(frozen=True)
class Softmax(Normalizer):
    """p_j = exp(s_j) / (sum_j exp(s_j) + exp(sink)).

    Args:
        sink: score of an additional key whose value is 0, so that weights sum to less than 1: a number, or a tensor of
            shape () or (H,), which may be a parameter. A sink of 0 is "softmax off by one". None, the default, is the
            usual softmax. The sink is neither masked nor scaled.

    Source: Miller, "Attention Is Off By One" (2023); learned per head in OpenAI, "gpt-oss" (2025).

    >>> q, k, v = torch.zeros(1, 4), torch.zeros(3, 4), torch.ones(3, 1)
    >>> regard.attention(q, k, v), regard.attention(q, k, v, normalizer=normalizer.Softmax(sink=0.0))
    (tensor([[1.]]), tensor([[0.7500]]))
    """

    sink: float | Tensor | None = None

    def weights(self, s: Tensor, tile: Tile) -> Tensor:
        p = _simplex(s, 1.0)
        if self.sink is None:
            return p
        # The keys' share of the total weight is e^lse / (e^lse + e^sink). The gradient of logsigmoid is the share of
        # the sink itself; that of sigmoid computes it as 1 - (1 - share), which loses a small share to rounding.
        return p * torch.nn.functional.logsigmoid(log_sum_exp(s)[..., None] - self._sink(s, tile)).exp()

    def total(self, lse: Tensor, tile: Tile) -> Tensor:
        """Return the log-sum-exp (b, h, l) including the sink."""
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
    """p_j = 1 / (1 + exp(-(s_j + bias))): each weight depends on its own score only, and weights do not sum to 1.

    Args:
        bias: a number, or a tensor of shape () or (H,). The paper recommends -log(S).

    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (2024), equation 3.

    >>> q, k, v = torch.zeros(1, 4), torch.zeros(3, 4), torch.ones(3, 1)
    >>> regard.attention(q, k, v, normalizer=normalizer.Sigmoid())  # 3 keys of weight 1/2
    tensor([[1.5000]])
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
    """p_j = max(0, (alpha - 1) s_j - tau)^(1 / (alpha - 1)), with tau such that p sums to 1.

    These weights maximize p.s plus the Tsallis entropy of order alpha over the simplex. They are sparse, and sparser for
    larger alpha: the limit alpha -> 1 is softmax, and alpha = 2 is sparsemax.

    Args:
        alpha: a number > 1, or a tensor of shape () or (H,) of such numbers, which may be a parameter: the order is then
            learned, as a whole or per head. Where a value of a tensor is not > 1, weights are NaN. Numbers up to 2 run on
            the native kernels.

    Source: Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models" (2019), equation 4; learned alpha: Correia,
    Niculae, Martins, "Adaptively Sparse Transformers" (2019), proposition 1.

    >>> q, k, v = torch.tensor([[1.0]]), torch.tensor([[1.0], [0.5], [-2.0]]), torch.eye(3)
    >>> regard.attention(q, k, v, normalizer=normalizer.Entmax(1.5))
    tensor([[0.6740, 0.3260, 0.0000]])
    """

    alpha: float | Tensor = 1.5

    def weights(self, s: Tensor, tile: Tile) -> Tensor:
        if isinstance(self.alpha, Tensor):
            return entmax(s, tile.cut_heads(self.alpha))
        return _simplex(s, self.alpha) if self.alpha <= 2.0 else entmax(s, s.new_full((), self.alpha))

    def check(self, sizes: Sizes) -> None:
        if isinstance(self.alpha, Tensor):
            check.per_head("normalizer: alpha", self.alpha, sizes.H)
        elif not check.is_number(self.alpha) or not 1.0 < self.alpha < math.inf:
            expected = f"a number > 1, or a float tensor of shape () or (H,) = ({sizes.H},)"
            raise check.error("normalizer: alpha", self.alpha, expected, check.is_number(self.alpha))


@dataclass(frozen=True)
class Sparsemax(Normalizer):
    """p = the point of the probability simplex nearest to s. Same as Entmax with alpha = 2.

    Source: Martins, Astudillo, "From Softmax to Sparsemax" (2016), equation 2.

    >>> q, k, v = torch.tensor([[1.0]]), torch.tensor([[1.0], [0.5], [-2.0]]), torch.eye(3)
    >>> regard.attention(q, k, v, normalizer=normalizer.Sparsemax())
    tensor([[0.7500, 0.2500, 0.0000]])
    """

    def weights(self, s: Tensor, tile: Tile) -> Tensor:
        return Entmax(2.0).weights(s, tile)


class _Simplex(torch.autograd.Function):
    """Softmax (alpha = 1) and entmax (1 < alpha <= 2). The Jacobian is diag(g) - g g^T / sum(g), with g = p^(2 - alpha)
    on the support. The gradient is a differentiable function of the result p, which gives derivatives of any order.
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
        return times_score_jacobian(p, ctx.alpha, direction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Simplex._apply_jacobian(ctx, grad), None


class _Transformed(_Simplex):
    """`_Simplex` with the rules of torch.func, which torch.compile cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _Simplex._apply_jacobian(ctx, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], s: Tensor, alpha: float) -> tuple[Tensor, int]:
        return _Transformed.apply(s.movedim(in_dims[0], 0), alpha), 0  # type: ignore[no-untyped-call]


def _simplex(s: Tensor, alpha: float) -> Tensor:
    if is_tracing():  # graphs of torch.jit and ONNX hold no Python functions
        return _softmax(s) if alpha == 1 else _entmax(s, alpha)
    function = _Simplex if torch.compiler.is_compiling() else _Transformed
    p: Tensor = function.apply(s, alpha)  # type: ignore[no-untyped-call]
    return p


def _softmax(s: Tensor) -> Tensor:
    # Negligible weights (below 1e-31 in float32) are set to 0: steep biases produce thousands of them, and arithmetic
    # on subnormal numbers is fifty times slower.
    limits = torch.finfo(s.dtype)
    return torch.threshold(torch.softmax(s, -1), limits.tiny / limits.eps, 0.0)


def _entmax(s: Tensor, alpha: float) -> Tensor:
    # Newton's method on f(tau) = |p(tau)^(alpha - 1)| - 1, with the norm of order 1 / (alpha - 1). f is convex and
    # decreasing: starting from f >= 0, no step passes the root. f is nearly linear: it takes 5 to 8 steps, where sum(p)
    # - 1 takes 10 to 14. At tau = max - 1 the largest element alone gives f >= 0.
    z = (alpha - 1) * (s - s.amax(-1, keepdim=True))
    power = 1 / (alpha - 1)
    tau = torch.full_like(z[..., :1], -1.0)
    # Where values are unknown, no loop can stop early: it takes 16 steps. The largest number ever observed is 10.
    can_stop = has_values(z)
    for left in reversed(range(100 if can_stop else 16)):
        gap = (z - tau).clamp_(min=0)
        p = gap if power == 1 else gap**power
        slope = (gap > 0).to(z.dtype) if power == 1 else gap if power == 2 else gap ** (power - 1)
        total = p.sum(-1, keepdim=True)
        step = (total ** (alpha - 1) - 1) * total ** (2 - alpha) / slope.sum(-1, keepdim=True)
        # The last steps are rounding errors of either sign: stop when no row changes.
        moved = tau + step.clamp(min=0)
        if not left or (can_stop and not bool((moved > tau).any())):
            break
        tau = moved
    # Apply the last step, of either sign, to z - tau instead of tau. The rounding error of tau is common to all
    # weights: with 1000 small weights it adds up, and the final division would shift the sum of these errors to the
    # largest one.
    gap = (z - tau - step).clamp_(min=0)
    p = gap if power == 1 else gap**power
    return p / p.sum(-1, keepdim=True)


# All normalizers by name. Tests, benchmarks, the command line and the documentation iterate over this table.
_NORMALIZERS: dict[str, type[Normalizer]] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "sparsemax": Sparsemax,
    "entmax": Entmax,
}
