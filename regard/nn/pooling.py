"""Pooling: one vector, or a few, out of many; and regression, where what is near counts most."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard import check
from regard.attention import attention
from regard.components.mask import Mask
from regard.components.score import Additive, Gaussian
from regard.components.summary import AttentionSummary, Summary
from regard.nn.memory import check_axes, check_chance, check_mask, vector


class AttentionPooling(nn.Module):
    """Learned queries q attend to a sequence x, in heads:

        y_n = sum_j softmax(q_n . (W_k x_j) / sqrt(width / num_heads))_j (W_v x_j + b)

    The order of the sequence does not matter, and what is padded does not count. An empty sequence gives 0.

    >>> pool = AttentionPooling(256, num_heads=4)
    >>> pool(x, mask.lengths(n))  # (B, S, 256) -> (B, 256)

    Args:
        width: of the sequence and of the result.
        queries: how many vectors are made of a sequence.
        num_heads: a divisor of the width.
        dropout: the chance that a weight is dropped in training.

    Source: Lee et al., "Set Transformer" (2019), section 3.2, without the feed-forward layers that follow.
    """

    def __init__(self, width: int, queries: int = 1, num_heads: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        check.whole("AttentionPooling: width", width, 1)
        check.whole("AttentionPooling: queries", queries, 1)
        check.whole("AttentionPooling: num_heads", num_heads, 1)
        if width % num_heads:
            raise check.wrong("AttentionPooling: num_heads", num_heads, f"a divisor of the width, {width}", True)
        check_chance("AttentionPooling: dropout", dropout)
        self.width, self.num_heads, self.dropout = width, num_heads, dropout
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(queries, width)))
        self.key_map = nn.Linear(width, width, bias=False)  # a bias would add the same to all scores of a row
        self.value_map = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Mask | None = None, *, summary: Summary | None = None
    ) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Pool a sequence.

        Args:
            x: (B, S, width).
            mask: one of `regard.mask`, such as `mask.lengths(n)`. True = may attend.
            summary: what else to tell about the weights.

        Returns:
            (B, width) for one query, (B, queries, width) for several; with `summary`, a pair of it and `AttentionSummary`, of shapes
            (B, num_heads, queries) and so on.
        """
        check_axes("AttentionPooling: x", x, "B, S", self.width)
        check_mask("AttentionPooling: mask", mask)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
            for part in (self.queries.expand(len(x), -1, -1), self.key_map(x), self.value_map(x))
        )
        found = attention(q, k, v, mask=mask, dropout=self.dropout if self.training else 0.0, summary=summary)
        out, seen = found if isinstance(found, tuple) else (found, None)
        out = out.transpose(1, 2).flatten(2)
        out = out[:, 0] if len(self.queries) == 1 else out
        return out if seen is None else (out, seen)

    def extra_repr(self) -> str:
        return f"{self.width}, queries={len(self.queries)}, num_heads={self.num_heads}, dropout={self.dropout}"


class AdditivePooling(nn.Module):
    """The mean of a sequence x, weighed by a small network:

        y = sum_j softmax(u . tanh(W x_j + b))_j x_j

    Several vectors u give several means. An empty sequence gives 0.

    Args:
        width: of the sequence and of the result.
        hidden_width: of the hidden layer; `width` by default.
        queries: how many vectors u there are.
        dropout: the chance that a weight is dropped in training.

    Source: Yang et al., "Hierarchical Attention Networks for Document Classification" (2016), equations 5 to 7; for
    several vectors, Lin et al., "A Structured Self-attentive Sentence Embedding" (2017), equation 6.
    """

    def __init__(self, width: int, hidden_width: int | None = None, queries: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        hidden_width = width if hidden_width is None else hidden_width
        check.whole("AdditivePooling: width", width, 1)
        check.whole("AdditivePooling: hidden_width", hidden_width, 1, ", or None for the width")
        check.whole("AdditivePooling: queries", queries, 1)
        check_chance("AdditivePooling: dropout", dropout)
        self.width, self.dropout = width, dropout
        self.map = nn.Linear(width, hidden_width)
        self.u = vector(queries, hidden_width)

    def forward(
        self, x: Tensor, mask: Mask | None = None, *, summary: Summary | None = None
    ) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Pool a sequence.

        Args:
            x: (B, S, width).
            mask: one of `regard.mask`, such as `mask.lengths(n)`. True = may attend.
            summary: what else to tell about the weights.

        Returns:
            (B, width) for one u, (B, queries, width) for several; with `summary`, a pair of it and `AttentionSummary`, in which
            each u is a head with one query: (B, queries, 1) and so on.
        """
        check_axes("AdditivePooling: x", x, "B, S", self.width)
        check_mask("AdditivePooling: mask", mask)
        # A query of zeros for each u: what is added to the keys is theirs already.
        keys = self.map(x)[:, None]
        query = keys.new_zeros(1, 1, 1, 1).expand(len(x), len(self.u), 1, keys.shape[-1])
        found = attention(
            query, keys, x[:, None], score=Additive(self.u), mask=mask, summary=summary,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        out, seen = found if isinstance(found, tuple) else (found, None)
        out = out[:, 0, 0] if len(self.u) == 1 else out[:, :, 0]
        return out if seen is None else (out, seen)

    def extra_repr(self) -> str:
        return f"{self.width}, queries={len(self.u)}, dropout={self.dropout}"


class KernelPooling(nn.Module):
    """Nadaraya-Watson regression: the value at a point is the mean of the known values, weighed by how near they are.

        y(q) = sum_j softmax(-|q - k_j|^2 / (2 sigma^2))_j v_j

    Trained on the points it knows, each point would best look at itself alone. A mask leaves it out:

    >>> pool = KernelPooling(sigma=0.5)
    >>> loss = (pool(x, x, y, ~mask.window(0, 0)) - y).square().mean()

    Args:
        sigma: the width of the kernel, in the units of the points; in training, where it starts from.
        learned: learn it, by its logarithm.

    Source: Nadaraya (1964), Watson (1964).
    """

    def __init__(self, sigma: float = 1.0, *, learned: bool = True) -> None:
        super().__init__()
        check.positive("KernelPooling: sigma", sigma)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)), requires_grad=learned)

    @property
    def sigma(self) -> Tensor:
        """The width of the kernel, of shape ()."""
        return self.log_sigma.exp()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None = None, *, summary: Summary | None = None
    ) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Values at the points of the queries.

        Args:
            query: points (B, L, D), or (L, D).
            key: the points where values are known, (B, S, D), or (S, D).
            value: the values there, (B, S, E), or (S, E).
            mask: one of `regard.mask`. True = may attend.
            summary: what else to tell about the weights.

        Returns:
            (B, L, E), or (L, E); with `summary`, a pair of it and `AttentionSummary`. Where no point may be looked at it is 0.
        """
        fits = check.is_floats(query)
        if not fits or query.dim() not in (2, 3):
            raise check.wrong("KernelPooling: query", query, "floats of shape (B, L, D) or (L, D)", fits)
        batch, width = tuple(query.shape[:-2]), query.shape[-1]
        fits = check.is_floats(key)
        if not fits or key.dim() != query.dim() or (*key.shape[:-2], key.shape[-1]) != (*batch, width):
            expected = (
                f"floats of shape ({''.join(f'{n}, ' for n in batch)}S, {width}), as query has {tuple(query.shape)}"
            )
            raise check.wrong("KernelPooling: key", key, expected, fits)
        fits = check.is_floats(value)
        if not fits or value.shape[:-1] != key.shape[:-1]:
            expected = f"floats of shape ({', '.join(map(str, key.shape[:-1]))}, E), as many as there are keys"
            raise check.wrong("KernelPooling: value", value, expected, fits)
        check_mask("KernelPooling: mask", mask)
        return attention(query, key, value, score=Gaussian(self.sigma), mask=mask, summary=summary)
