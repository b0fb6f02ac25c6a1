"""Statistics of the attention weights: the tensors that a summary consists of.

Each statistic is one class, which holds all that backends need to know of it: the name and the axes of its result, the
value of rows without keys, and the formula. Output order, allocation, results in compiled graphs, and what a backend
refuses follow from these classes. A subclass of `Statistic` in `Summary(other=...)` adds a statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.components.normalizer import Normalizer, Softmax
from regard.components.tensor_ops import log_sum_exp
from regard.components.tile import Range, Sizes, Tile, concat_ranges


@dataclass
class Weights:
    """The attention weights of some queries, as `Statistic.compute` receives them.

    Args:
        p: weights (b, h, l, w) after normalization and before dropout, for w of the keys. The weights of all other keys
            are 0.
        scores: scores of the same keys, including scale, softcap, bias and mask: -inf for masked pairs, but 0 for queries
            that may attend to no key.
        columns: which keys these are, as ranges of indices, in order.
        empty: bool (b, h, l, 1), the queries that may attend to no key; None if there are none.
        tile: the ranges of batch rows, heads and queries, and the sizes of the problem.
        normalizer: the normalizer of the call.
    """

    p: Tensor
    scores: Tensor
    columns: Sequence[Range]
    empty: Tensor | None
    tile: Tile
    normalizer: Normalizer
    _top: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def of_keys(self, part: Callable[[Range], Tensor]) -> Tensor:
        """Concatenate what `part` returns for each range of keys, along the last dimension."""
        return concat_ranges(self.columns, part)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest weights and their keys (b, h, l, k); the weights are 0 and the keys -1 where a query may
        attend to fewer than k keys.
        """
        if k in self._top:
            return self._top[k]
        # Weights increase with scores, so the largest scores have the largest weights. Unlike weights, scores also
        # distinguish a pair that may not attend (-inf) from one whose weight is 0.
        best, index = self.scores.detach().topk(min(k, self.scores.shape[-1]), -1)
        absent = best == -math.inf
        absent = absent if self.empty is None else absent | self.empty
        keys = self.of_keys(lambda c: torch.arange(*c, device=best.device))[index].masked_fill(absent, -1)
        weights = self.p.gather(-1, index)
        missing = k - index.shape[-1]
        if missing:
            weights = torch.nn.functional.pad(weights, (0, missing))
            keys = torch.nn.functional.pad(keys, (0, missing), value=-1)
        self._top[k] = weights, keys
        return weights, keys


@dataclass
class Parts:
    """The statistics of calls over disjoint sets of keys, as `Statistic.merge` receives them.

    Args:
        statistics: those of each call, by name.
        shares: the weight (B, H, L) that each set has among all keys, exp(lse_part - lse); 0 for queries that may attend to
            no key.
        lse: the log-sum-exp (B, H, L) over all keys; -inf for such queries.
        starts: the index of the first key of each set; None if it is unknown.
    """

    statistics: Sequence[Mapping[str, Tensor]]
    shares: Sequence[Tensor]
    lse: Tensor
    starts: Sequence[int] | None

    def rescaled(self, name: str) -> list[Tensor]:
        """Return a statistic of each part, (B, H, L) or (B, H, L, ...), multiplied by its share."""
        pairs = zip(self.shares, self.of(name), strict=True)
        return [share.view(*share.shape, *[1] * (x.dim() - share.dim())) * x for share, x in pairs]

    def of(self, name: str) -> list[Tensor]:
        """Return a statistic of each part."""
        return [part[name] for part in self.statistics]

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest weights of all parts, and their keys."""
        if self.starts is None:
            raise ValueError("merge: starts is None; expected the index of the first key of each part, for top keys")
        weights = torch.cat(self.rescaled(TopWeights.name), -1)
        found = zip(self.of(TopKeys.name), self.starts, strict=True)
        keys = torch.cat([torch.where(x < 0, x, x + start) for x, start in found], -1)
        order = weights.detach().masked_fill(keys < 0, -1.0).topk(k, -1).indices
        return weights.gather(-1, order), keys.gather(-1, order)


class Statistic:
    """Base class of statistics of the attention weights. Subclasses define `name`, `axes` and `compute`.

    Attributes:
        name: the name of the result.
        axes: the dimensions of the result, one letter each: "BHL" with any other letters after it for a statistic of each
            query, "BHS" for one of each key, summed over the queries, "BHLS" for all pairs. `size` returns the size of
            axes other than B, H, L and S.
        empty: the value for queries that may attend to no key; with axes "BHLS", for pairs that may not attend.
        dtype: None for the precision of the sums, float32 or float64; integer results have no gradient.
        includes_sink: whether a sink gives a value other than `empty` to queries that may attend to no key.

    >>> class Effective(summary.Statistic):
    ...     '''The effective number of keys, 1 / sum_j p_j^2.'''
    ...     name = "effective"
    ...     def compute(self, weights):
    ...         return 1 / weights.p.square().sum(-1)
    >>> x = torch.zeros(1, 1, 3, 4)
    >>> _, stats = regard.attention(x, x, x, mask=mask.causal(), summary=Summary(other=(Effective(),)))
    >>> stats.other["effective"]
    tensor([[[1.0000, 2.0000, 3.0000]]])
    """

    name: str = ""
    axes: str = "BHL"
    empty: float = 0.0
    dtype: torch.dtype | None = None
    includes_sink: bool = False

    def compute(self, weights: Weights) -> Tensor:
        """Return the statistic of some queries, in the order of `axes`: (b, h, l, ...), (b, h, w) or (b, h, l, w)."""
        raise NotImplementedError

    def merge(self, parts: Parts) -> Tensor:
        """Return the statistic over all keys from those over disjoint sets of keys, for `regard.merge`."""
        raise NotImplementedError(f"{self.name} over all keys does not follow from {self.name} over parts of them")

    def size(self, axis: str) -> int:
        """Return the size of an axis other than B, H, L and S."""
        raise NotImplementedError

    def rows_in(self, tile: Tile) -> tuple[list[int], list[int]]:
        """With an axis R, selected queries: return which of these lie in a tile, as indices on R and in the tile."""
        raise NotImplementedError

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of the result."""
        known = {"B": sizes.B, "H": sizes.H, "G": sizes.G, "L": sizes.L, "S": sizes.S}
        return tuple([known[axis] if axis in known else self.size(axis) for axis in self.axes])


class LogSumExp(Statistic):
    """See `Summary.lse`."""

    name = "lse"
    empty = -math.inf
    includes_sink = True

    def compute(self, weights: Weights) -> Tensor:
        lse = log_sum_exp(weights.scores)
        lse = lse if weights.empty is None else lse.masked_fill(weights.empty[..., 0], -math.inf)
        normalizer = weights.normalizer
        return normalizer.total(lse, weights.tile) if isinstance(normalizer, Softmax) else lse

    def merge(self, parts: Parts) -> Tensor:
        return parts.lse


class LargestWeight(Statistic):
    """See `Summary.max`."""

    name = "max"

    def compute(self, weights: Weights) -> Tensor:
        return weights.p.amax(-1)

    def merge(self, parts: Parts) -> Tensor:
        return torch.stack(parts.rescaled(self.name)).amax(0)


class Entropy(Statistic):
    """See `Summary.entropy`."""

    name = "entropy"

    def compute(self, weights: Weights) -> Tensor:
        # Replacing 0 by 1 inside the log keeps the gradient finite.
        p = weights.p
        return -(p * torch.log(torch.where(p > 0, p, 1.0))).sum(-1)

    def merge(self, parts: Parts) -> Tensor:
        # -sum_a sum_j (w_a p_j) log(w_a p_j) = sum_a w_a (entropy_a - log w_a), where the weights of a part sum to 1.
        total = torch.stack(parts.rescaled(self.name)).sum(0)
        shares = torch.stack(list(parts.shares))
        return total - (shares * torch.log(torch.where(shares > 0, shares, 1.0))).sum(0)


class Received(Statistic):
    """See `Summary.received`."""

    name = "received"
    axes = "BHS"

    def compute(self, weights: Weights) -> Tensor:
        return weights.p.sum(-2)


class FullWeights(Statistic):
    """See `Summary.full`."""

    name = "full"
    axes = "BHLS"

    def compute(self, weights: Weights) -> Tensor:
        return weights.p

    def merge(self, parts: Parts) -> Tensor:
        return torch.cat(parts.rescaled(self.name), -1)


@dataclass(frozen=True)
class _Top(Statistic):
    axes = "BHLK"
    k: int = 1

    def size(self, axis: str) -> int:
        return self.k


class TopWeights(_Top):
    """The weights of `Summary.top`."""

    name = "top_weights"

    def compute(self, weights: Weights) -> Tensor:
        return weights.top(self.k)[0]

    def merge(self, parts: Parts) -> Tensor:
        return parts.top(self.k)[0]


class TopKeys(_Top):
    """The keys of `Summary.top`."""

    name = "top_keys"
    empty = -1
    dtype = torch.int64

    def compute(self, weights: Weights) -> Tensor:
        return weights.top(self.k)[1]

    def merge(self, parts: Parts) -> Tensor:
        return parts.top(self.k)[1]


@dataclass(frozen=True)
class Mass(Statistic):
    """See `Summary.mass`."""

    name = "mass"
    axes = "BHLN"
    member: Any  # bool (N, S) or (B, N, S)

    def size(self, axis: str) -> int:
        return int(self.member.shape[-2])

    def compute(self, weights: Weights) -> Tensor:
        member = self.member if self.member.dim() == 3 else self.member[None]
        member = (member[slice(*weights.tile.b)] if member.shape[0] > 1 else member)[:, None]
        return weights.p @ weights.of_keys(lambda k: member[..., slice(*k)]).to(weights.p.dtype).mT

    def merge(self, parts: Parts) -> Tensor:
        return torch.stack(parts.rescaled(self.name)).sum(0)


@dataclass(frozen=True)
class RowWeights(Statistic):
    """See `Summary.rows`."""

    name = "rows"
    axes = "BHRS"
    rows: tuple[int, ...]

    def size(self, axis: str) -> int:
        return len(self.rows)

    def rows_in(self, tile: Tile) -> tuple[list[int], list[int]]:
        indices, rows = [], []
        for index, row in enumerate(self.rows):
            row = row + tile.sizes.L if row < 0 else row
            if tile.q[0] <= row < tile.q[1]:
                indices.append(index)
                rows.append(row - tile.q[0])
        return indices, rows

    def compute(self, weights: Weights) -> Tensor:
        return weights.p[..., self.rows_in(weights.tile)[1], :]

    def merge(self, parts: Parts) -> Tensor:
        pairs = zip(parts.shares, parts.of(self.name), strict=True)
        return torch.cat([share[..., list(self.rows), None] * x for share, x in pairs], -1)


# All built-in statistics, in the order in which backends return them.
BUILT_IN: tuple[type[Statistic], ...] = (
    LogSumExp,
    LargestWeight,
    Entropy,
    Received,
    FullWeights,
    TopWeights,
    TopKeys,
    Mass,
    RowWeights,
)
