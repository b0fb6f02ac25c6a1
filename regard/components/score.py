"""Scores: how well a query matches a key.

A score is defined by `pair`, the formula for one query and one key. That alone makes it work: every kernel in plain
PyTorch can compute it, in tiles, with gradients. A score that is a dot product in disguise says so in `reduce`, and
then runs on the fastest kernels. To add a score: write the class, and enter it in the table at the end of this file.
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
    """What all scores share. Subclasses give `pair`, and `reduce` where there is a shorter way."""

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        """The formula: q (..., D) and k (..., D) broadcast together; the result has shape (...)."""
        raise NotImplementedError

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        """Rewrite as new q (B, H, L, D'), new k (B, G, S, D') and a simpler score of them, with the same values."""
        return q, k, self

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        """The scores of a tile: q (b, h, l, D), k (b, g, s, D) -> (b, h, l, s)."""
        return self.pair(q[..., :, None, :], for_queries(k, q)[..., None, :, :])

    def volume(self, width: int) -> int:
        """How many numbers are held per pair while a tile is scored; kernels size their tiles by it."""
        return width

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        """Raise a ValueError where q and k, or a tensor of the score, do not fit."""
        if q_width != k_width:
            raise ValueError(
                f"k has width {k_width} but q has width {q_width}; expected the same for score.{type(self).__name__} "
                "(score.Bilinear and score.Additive map q and k of different widths)"
            )

    @classmethod
    def example(cls, heads: int, width: int) -> Score:
        """One of these with random parameters, for tests and benchmarks."""
        return cls()


@dataclass(frozen=True)
class Product(Score):
    """scale * q.k + key_bias + query_bias: what every score of the dot family comes down to.

    key_bias (B, G, S) and query_bias (B, H, L) are None or tensors; a scale of None is 1/sqrt(D), which lets a compiled
    graph leave D open.
    """

    scale: float | None = 1.0
    key_bias: Tensor | None = None
    query_bias: Tensor | None = None

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.scaled(q) * k).sum(-1)

    def scaled(self, x: Tensor) -> Tensor:
        """The scale times a tensor of width D."""
        return x * ((x.shape[-1] or 1) ** -0.5 if self.scale is None else self.scale)

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        # All queries that share a key/value head are rows of one product: k is not repeated.
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
    """What the scores with a scale share: it is 1/sqrt(D) by default."""

    scale: float | None = None

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        super().check(sizes, q_width, k_width)
        if self.scale is not None:
            check.finite("score: scale", self.scale, ", or None for 1/sqrt(D); for a learned one, multiply q by it")

    def _scale(self, q: Tensor) -> float:
        # A width of 0 has no scores to scale.
        return (q.shape[-1] or 1) ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class ScaledDot(Scaled):
    """s_ij = q_i . k_j * scale; scale is 1/sqrt(D) by default.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.
    """

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * k).sum(-1) * self._scale(q)

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        return q, k, Product(self.scale)


@dataclass(frozen=True)
class Dot(Score):
    """s_ij = q_i . k_j. Source: Luong, Pham, Manning (2015), "dot", equation 8."""

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * k).sum(-1)

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        return q, k, Product()


@dataclass(frozen=True)
class Cosine(Score):
    """s_ij = (q_i . k_j) / (|q_i| |k_j|) / temperature; a vector of zeros has cosine 0 with every other.

    Args:
        temperature: a number, or a tensor of shape () or (H,), learned if you like.

    Source: Graves, Wayne, Danihelka, "Neural Turing Machines" (2014), equation 6; as attention of transformers, Liu et
    al., "Swin Transformer V2" (2022), equation 2.
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
    """The vectors x (..., D) made unit vectors, but 0 (with gradient 0) for 0. The largest entry is taken out first, so
    that no square over- or underflows.
    """
    x = widen(x)
    peak = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(*x.shape[:-1], 1)
    zero = peak == 0
    x = x / peak.masked_fill(zero, 1.0)
    return x * (x.square().sum(-1, keepdim=True).masked_fill(zero, 1.0)).rsqrt()


@dataclass(frozen=True)
class Bilinear(Score):
    """s_ij = q_i^T W k_j.

    Args:
        W: (Dq, Dk), or (H, Dq, Dk) for a map per head. q has width Dq, k has width Dk.

    Source: Luong, Pham, Manning (2015), "general", equation 8.
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
    """s_ij = -|q_i - k_j|^2 / (2 sigma^2): Nadaraya-Watson kernel regression, once softmax has been applied.

    Args:
        sigma: the width of the kernel in the units of q and k: a number, or a tensor of shape () or (H,).

    Source: Nadaraya (1964), Watson (1964).
    """

    sigma: Number = 1.0

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return -(q - k).square().sum(-1) / (2 * self.sigma**2)

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        if isinstance(self.sigma, Tensor) and self.sigma.dim() == 1 and k.shape[1] != q.shape[1]:
            k = for_queries(k, q)
        q, k = _centred(q, k)
        # Widened once for both: the two halves of its gradient nearly cancel.
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
    """s_ij = -|q_i - k_j|^2 * scale; scale is 1/sqrt(D) by default.

    Source: Kim, Papamakarios, Mnih, "The Lipschitz Constant of Self-Attention" (2021), section 3.2 (L2 attention).
    """

    def pair(self, q: Tensor, k: Tensor) -> Tensor:
        return -(q - k).square().sum(-1) * self._scale(q)

    def reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Score]:
        return _squared_distance(*_centred(q, k), self._scale(q))


def _centred(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Move q and k so that the keys of each head lie about the origin. Distances stay as they are.

    The way goes towards the mean key, but only as far as the nearest key along it, so that every key comes closer to
    the origin. A key that is masked out may hold any number: the mean itself would carry off the precision of all the
    others.
    """
    q, k = widen(q), widen(k)
    if not k.shape[2]:
        return q, k
    mean = k.detach().mean(2, keepdim=True)
    towards = mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
    nearest = (k.detach() @ towards.mT).amin(2, keepdim=True)
    centre = (towards * nearest.clamp(min=0.0)).nan_to_num(0.0, 0.0, 0.0)
    return q - for_queries(centre, q), k - centre


def _squared_distance(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Score]:
    """-|q - k|^2 * scale as a product: 2 scale q.k - scale |k|^2 - scale |q|^2, three terms that nearly cancel where
    they are large.
    """
    return q * (2 * scale), k, Product(1.0, -scale * k.square().sum(-1), -scale * q.square().sum(-1))


@dataclass(frozen=True)
class Additive(Score):
    """s_ij = v . tanh(w_q q_i + w_k k_j + bias).

    Args:
        v: (A,) or (H, A).
        w_q: (A, Dq) or (H, A, Dq). w_k: (A, Dk) or (G, A, Dk). Without a map, q (or k) is taken as already mapped.
        bias: (A,) or (H, A).

    Source: Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015),
    appendix A.1.2. The "concat" score of Luong, Pham, Manning (2015) is the same; w_q and w_k are the halves of its W.
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
        q = q if self.bias is None else q + _rows(self.bias).to(q.dtype)
        return q, k, Additive(self.v)

    def scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        hidden = torch.tanh(q[..., :, None, :] + for_queries(k, q)[..., None, :, :])
        v = self.v.to(q.dtype)
        # Not a product with a vector: it is faster, but its sums, and those of its gradient, round twice as much.
        return (hidden * (v if v.dim() == 1 else v[slice(*tile.h), None, None])).sum(-1)

    def check(self, sizes: Sizes, q_width: int, k_width: int) -> None:
        fits = check.is_floats(self.v)
        A = self.v.shape[-1] if fits and self.v.dim() else 0
        if not fits or not check.is_one_of(self.v.shape, ((A,), (sizes.H, A))):
            raise check.wrong("score: v", self.v, f"floats of shape (A,) or (H, A) with H = {sizes.H}", fits)
        for name, W, heads, letter, axis, width in (
            ("w_q", self.w_q, sizes.H, "H", "Dq", q_width),
            ("w_k", self.w_k, sizes.G, "G", "Dk", k_width),
        ):
            if W is not None:
                _check_map(name, W, heads, letter, ("A", A), (axis, width))
            elif width != A:
                raise ValueError(
                    f"score: v has width {A} but {name[-1]} has width {width}; expected the same, or a map {name} of "
                    f"shape ({A}, {width})"
                )
        if self.bias is not None:
            expected = f"(A,) = ({A},) or (H, A) = ({sizes.H}, {A})"
            check.floats("score: bias", self.bias, ((A,), (sizes.H, A)), expected)

    @classmethod
    def example(cls, heads: int, width: int) -> Score:
        w_q, w_k = (torch.randn(width + 2, width) / width**0.5 for _ in range(2))
        return Additive(torch.randn(heads, width + 2), w_q, w_k, torch.randn(width + 2))


def _per_head(x: Tensor) -> Tensor:
    return x if x.dim() == 0 else x[:, None, None]


def _rows(x: Tensor) -> Tensor:
    """(A,) or (H, A), shaped to broadcast to (B, H, L, A)."""
    return x if x.dim() == 1 else x[:, None, :]


def _check_map(name: str, W: Tensor, heads: int, letter: str, rows: tuple[str, int], columns: tuple[str, int]) -> None:
    """Raise unless W is a map (rows, columns), or one per head."""
    shape, axes = (rows[1], columns[1]), f"{rows[0]}, {columns[0]}"
    expected = f"({axes}) = {shape}, or per head ({letter}, {axes}) = {(heads, *shape)}"
    check.floats(f"score: {name}", W, (shape, (heads, *shape)), expected)


# Every score by name: tests, benchmarks, the command line and the documentation loop over this table.
_SCORES: dict[str, type[Score]] = {
    "scaled_dot": ScaledDot,
    "dot": Dot,
    "cosine": Cosine,
    "bilinear": Bilinear,
    "gaussian": Gaussian,
    "distance": Distance,
    "additive": Additive,
}
