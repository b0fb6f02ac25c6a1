"""Scores: how well a query matches a key.

A score is defined by `pair`, the formula for one query and one key. This is sufficient: the backends in Python compute
any `pair` in tiles, with gradients. A score that can be rewritten as a dot product does so in `reduce`, and then runs
on the fastest backends. To add a score, write its class and add it to the table at the end of this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard import check
from regard.components.tensor_ops import fold_heads, for_queries, widen
from regard.components.tile import Sizes, Tile

Number = float | Tensor


@dataclass(frozen=True)
class Score:
    """Base class of scores. Subclasses define `pair`, and `reduce` if there is a cheaper equivalent."""

    # Whether `check` depends on the lengths L and S: then plans are cached per length.
    depends_on_lengths = False
    # Whether `scores` needs all query heads in one call.
    takes_all_heads = False

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores (...) of q (..., D) and k (..., D), which broadcast together."""
        raise NotImplementedError

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        """Return new q (B, H, L, D'), new k (B, G, S, D') and a simpler score that has the same values for them."""
        return q, k, self

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        """Return the scores (b, h, l, s) of a tile with q (b, h, l, D) and k (b, g, s, D)."""
        return self.pair(q[..., :, None, :], for_queries(k, q)[..., None, :, :])

    def volume(self, width: int) -> int:
        """Return the number of elements per pair in the largest temporary of `scores`; it limits the size of tiles."""
        return width

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        """Raise a ValueError if the widths of q and k, or a tensor of the score, do not fit."""
        if q_width != k_width:
            raise ValueError(
                f"k has width {k_width} but q has width {q_width}; expected the same for score.{type(self).__name__} "
                "(score.Bilinear and score.Additive take q and k of different widths)"
            )

    @classmethod
    def example(cls, heads: int, width: int) -> Score:
        """Return a score with random parameters, for tests and benchmarks."""
        return cls()


@dataclass(frozen=True)
class Product(Score):
    """scale * q.k + key_bias + query_bias: the common form of all scores based on a dot product.

    key_bias (B, G, S) and query_bias (B, H, L) are tensors or None. A scale of None stands for 1/sqrt(D), so that D can
    stay symbolic in a compiled graph.
    """

    scale: float | None = 1.0
    key_bias: Tensor | None = None
    query_bias: Tensor | None = None

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.scaled(q) * k).sum(-1)

    def scaled(self, x: Tensor) -> Tensor:
        """Return x (..., D) times the scale."""
        return x * ((x.shape[-1] or 1) ** -0.5 if self.scale is None else self.scale)

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        # All queries that share a key/value head are rows of one matrix product, so k is not repeated.
        out = (fold_heads(self.scaled(q), k) @ k.mT).view(*q.shape[:-1], k.shape[2])
        if self.key_bias is not None:
            bias = self.key_bias[slice(*tile.b), slice(*tile.g), slice(*tile.k)]
            out = out + for_queries(bias[..., None, :], q)
        if self.query_bias is not None:
            out = out + self.query_bias[slice(*tile.b), slice(*tile.h), slice(*tile.q)][..., None]
        return out

    def volume(self, width: int) -> int:
        return 1


@dataclass(frozen=True)
class Scaled(Score):
    """Base class of scores with a scale, by default 1/sqrt(D)."""

    scale: float | None = None

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        super().check(sizes, q_width, k_width)
        if self.scale is not None:
            check.finite("score: scale", self.scale, ", or None for 1/sqrt(D); for a learned one, multiply q by it")

    def _scale(self, q: Tensor) -> float:
        # With D = 0, all dot products are 0 and the scale does not matter.
        return (q.shape[-1] or 1) ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class ScaledDot(Scaled):
    """s_ij = q_i . k_j * scale.

    Args:
        scale: a number; 1/sqrt(D) by default, as in `scaled_dot_product_attention`.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.

    >>> q, k = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    >>> score.ScaledDot().pair(q, k), score.ScaledDot(scale=0.1).pair(q, k)
    (tensor([5.]), tensor([1.]))
    """

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * k).sum(-1) * self._scale(q)

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        return q, k, Product(self.scale)


@dataclass(frozen=True)
class Dot(Score):
    """s_ij = q_i . k_j, without a scale.

    Source: Luong, Pham, Manning (2015), "dot", equation 8.

    >>> score.Dot().pair(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    tensor(11.)
    """

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * k).sum(-1)

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        return q, k, Product()


@dataclass(frozen=True)
class Cosine(Score):
    """s_ij = (q_i . k_j) / (|q_i| |k_j|) / temperature. The cosine with a zero vector is 0.

    Args:
        temperature: a number > 0, or a tensor of shape () or (H,), which may be a parameter.

    Source: Graves, Wayne, Danihelka, "Neural Turing Machines" (2014), equation 6; in transformers, Liu et al., "Swin
    Transformer V2" (2022), equation 2.

    >>> score.Cosine(temperature=0.5).pair(torch.tensor([3.0, 4.0]), torch.tensor([10.0, 0.0]))
    tensor(1.2000)
    """

    temperature: Number = 1.0

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return (_unit(q) * _unit(k)).sum(-1) / self.temperature

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        q, k = _unit(q), _unit(k)
        if isinstance(self.temperature, Tensor):
            return q / _per_head(self.temperature).to(q.dtype), k, Product()
        return q, k, Product(1.0 / self.temperature)

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        super().check(sizes, q_width, k_width)
        check.per_head("score: temperature", self.temperature, sizes.H, positive=True)

    @classmethod
    def example(cls, heads: int, width: int) -> Score:
        return cls(torch.rand(heads) * 0.5 + 0.2)


def _unit(x: Tensor) -> Tensor:
    """Normalize vectors x (..., D) to length 1; a zero vector stays 0 and has gradient 0. The largest element is
    divided out first, so that squares neither overflow nor underflow.
    """
    x = widen(x)
    peak = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(*x.shape[:-1], 1)
    zero = peak == 0
    x = x / peak.masked_fill(zero, 1.0)
    return x * (x.square().sum(-1, keepdim=True).masked_fill(zero, 1.0)).rsqrt()


@dataclass(frozen=True)
class Bilinear(Score):
    """s_ij = q_i^T W k_j, without a scale.

    Args:
        W: (Dq, Dk), or (H, Dq, Dk) for one matrix per head. q has width Dq, k has width Dk.

    Source: Luong, Pham, Manning (2015), "general", equation 8.

    >>> W = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    >>> score.Bilinear(W).pair(torch.tensor([1.0, 10.0]), torch.tensor([3.0, 4.0, 5.0]))
    tensor(53.)
    """

    W: Tensor

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return ((q[..., None, :] @ self.W)[..., 0, :] * k).sum(-1)

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        q = widen(q)
        return q @ self.W.to(q.dtype), k, Product()

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        _check_map("W", self.W, sizes.H, "H", ("Dq", q_width), ("Dk", k_width))

    @classmethod
    def example(cls, heads: int, width: int) -> Score:
        return cls(torch.randn(heads, width, width) / width)


@dataclass(frozen=True)
class Gaussian(Score):
    """s_ij = -|q_i - k_j|^2 / (2 sigma^2). With softmax this is Nadaraya-Watson kernel regression.

    Args:
        sigma: bandwidth in the units of q and k: a number > 0, or a tensor of shape () or (H,).

    Source: Nadaraya (1964), Watson (1964).

    >>> score.Gaussian(sigma=2.0).pair(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    tensor(-1.)
    """

    sigma: Number = 1.0

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return -(q - k).square().sum(-1) / (2 * self.sigma**2)

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        if isinstance(self.sigma, Tensor) and self.sigma.dim() == 1 and k.shape[1] != q.shape[1]:
            k = for_queries(k, q)
        q, k = _centered(q, k)
        # Converted once for both, since the two parts of its gradient nearly cancel.
        sigma = _per_head(self.sigma).to(q.dtype) if isinstance(self.sigma, Tensor) else self.sigma
        return _squared_distance(q / sigma, k / sigma, 0.5)

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        super().check(sizes, q_width, k_width)
        check.per_head("score: sigma", self.sigma, sizes.H, positive=True)

    @classmethod
    def example(cls, heads: int, width: int) -> Score:
        return cls(torch.rand(heads) + 1.0)


@dataclass(frozen=True)
class Distance(Scaled):
    """s_ij = -|q_i - k_j|^2 * scale.

    Args:
        scale: a number; 1/sqrt(D) by default.

    Source: Kim, Papamakarios, Mnih, "The Lipschitz Constant of Self-Attention" (2021), section 3.2 (L2 attention).

    >>> score.Distance().pair(torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([3.0, 4.0, 0.0, 0.0]))
    tensor(-4.)
    """

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return -(q - k).square().sum(-1) * self._scale(q)

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        return _squared_distance(*_centered(q, k), self._scale(q))


def _centered(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Translate q and k so that the keys of each head lie near the origin. Distances do not change.

    The translation points to the mean key, but goes only as far as the nearest key in this direction, so that every key
    gets closer to the origin. A translation by the mean would lose precision if masked keys hold huge values.
    """
    q, k = widen(q), widen(k)
    if not k.shape[2]:
        return q, k
    mean = k.detach().mean(2, keepdim=True)
    direction = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
    nearest = (k.detach() @ direction.mT).amin(2, keepdim=True)
    center = (direction * nearest.clamp(min=0.0)).nan_to_num(0.0, 0.0, 0.0)
    return q - for_queries(center, q), k - center


def _squared_distance(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Score]:
    """Return -|q - k|^2 * scale as a dot product: 2 scale q.k - scale |k|^2 - scale |q|^2, whose terms may cancel."""
    return q * (2 * scale), k, Product(1.0, -scale * k.square().sum(-1), -scale * q.square().sum(-1))


@dataclass(frozen=True)
class Additive(Score):
    """s_ij = v . tanh(w_q q_i + w_k k_j + bias).

    Args:
        v: (A,) or (H, A).
        w_q: (A, Dq) or (H, A, Dq); None if q is already projected to width A.
        w_k: (A, Dk) or (G, A, Dk); None if k is already projected to width A.
        bias: (A,) or (H, A), or None.

    Source: Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015),
    appendix A.1.2. The "concat" score of Luong, Pham, Manning (2015) is the same; w_q and w_k are the halves of its W.

    >>> additive = score.Additive(v=torch.tensor([1.0, 10.0]))
    >>> additive.pair(torch.tensor([0.2, 5.0]), torch.tensor([0.3, 5.0]))
    tensor(10.4621)
    """

    v: Tensor
    w_q: Tensor | None = None
    w_k: Tensor | None = None
    bias: Tensor | None = None

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        q = q if self.w_q is None else (self.w_q @ q[..., None])[..., 0]
        k = k if self.w_k is None else (self.w_k @ k[..., None])[..., 0]
        return (torch.tanh(q + k if self.bias is None else q + k + self.bias) * self.v).sum(-1)

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        q, k = widen(q), widen(k)
        q = q if self.w_q is None else q @ self.w_q.to(q.dtype).mT
        k = k if self.w_k is None else k @ self.w_k.to(k.dtype).mT
        q = q if self.bias is None else q + _per_query(self.bias).to(q.dtype)
        return q, k, Additive(self.v)

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        hidden = torch.tanh(q[..., :, None, :] + for_queries(k, q)[..., None, :, :])
        v = self.v.to(q.dtype)
        # `hidden @ v` would be faster, but doubles the rounding error of the sums and of their gradients.
        return (hidden * (v if v.dim() == 1 else v[slice(*tile.h), None, None])).sum(-1)

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        fits = check.is_float_tensor(self.v)
        A = self.v.shape[-1] if fits and self.v.dim() else 0
        if not fits or not check.is_one_of(self.v.shape, ((A,), (sizes.H, A))):
            raise check.error("score: v", self.v, f"a float tensor of shape (A,) or (H, A) with H = {sizes.H}", fits)
        for name, W, heads, letter, axis, width in (
            ("w_q", self.w_q, sizes.H, "H", "Dq", q_width),
            ("w_k", self.w_k, sizes.G, "G", "Dk", k_width),
        ):
            if W is not None:
                _check_map(name, W, heads, letter, ("A", A), (axis, width))
            elif width != A:
                raise ValueError(
                    f"score: v has width {A} but {name[-1]} has width {width}; expected the same, or a matrix {name} of "
                    f"shape ({A}, {width})"
                )
        if self.bias is not None:
            expected = f"(A,) = ({A},) or (H, A) = ({sizes.H}, {A})"
            check.float_tensor("score: bias", self.bias, ((A,), (sizes.H, A)), expected)

    @classmethod
    def example(cls, heads: int, width: int) -> Score:
        w_q, w_k = (torch.randn(width + 2, width) / width**0.5 for _ in range(2))
        return Additive(torch.randn(heads, width + 2), w_q, w_k, torch.randn(width + 2))


def _per_head(x: Tensor) -> Tensor:
    return x if x.dim() == 0 else x[:, None, None]


def _per_query(x: Tensor) -> Tensor:
    """Reshape (A,) or (H, A) to broadcast to (B, H, L, A)."""
    return x if x.dim() == 1 else x[:, None, :]


def _check_map(name: str, W: Tensor, heads: int, letter: str, rows: tuple[str, int], columns: tuple[str, int]) -> None:
    """Raise unless W is a matrix (rows, columns), or one per head."""
    shape, axes = (rows[1], columns[1]), f"{rows[0]}, {columns[0]}"
    expected = f"({axes}) = {shape}, or per head ({letter}, {axes}) = {(heads, *shape)}"
    check.float_tensor(f"score: {name}", W, (shape, (heads, *shape)), expected)


# All scores by name. Tests, benchmarks, the command line and the documentation iterate over this table.
_SCORES: dict[str, type[Score]] = {
    "scaled_dot": ScaledDot,
    "dot": Dot,
    "cosine": Cosine,
    "bilinear": Bilinear,
    "gaussian": Gaussian,
    "distance": Distance,
    "additive": Additive,
}
