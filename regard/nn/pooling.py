"""Attention pooling of sequences, and Nadaraya-Watson regression."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard import check
from regard.attention import attention
from regard.components.mask import Mask
from regard.components.score import Additive, Gaussian
from regard.components.summary import AttentionSummary, Summary
from regard.nn.checks import check_features, check_mask, check_probability
from regard.nn.memory import make_vector


class AttentionPooling(nn.Module):
    """Multi-head attention of learned queries q_n over a sequence x:

        y_n = sum_j softmax(q_n . (W_k x_j) / sqrt(width / num_heads))_j (W_v x_j + b)

    The result does not depend on the order of the sequence. The result of an empty sequence is 0.

    >>> pool = regard.nn.AttentionPooling(8, num_heads=2)
    >>> x = torch.randn(2, 5, 8)
    >>> out = pool(x, mask.lengths(torch.tensor([5, 1])))
    >>> out.shape, torch.allclose(out[1], pool.value_map(x[1, 0]), atol=1e-6)  # the second sequence has a single key
    (torch.Size([2, 8]), True)
    >>> torch.allclose(out[0], pool(x[:1].flip(1))[0], atol=1e-6)
    True

    Args:
        width: width of the sequence and of the result.
        queries: number of learned queries, and so of result vectors.
        num_heads: number of heads, a divisor of width.
        dropout: dropout probability of the attention weights, in training.

    Source: Lee et al., "Set Transformer" (2019), section 3.2, without the feed-forward layers that follow.
    """

    def __init__(self, width: int, queries: int = 1, num_heads: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        check.integer("AttentionPooling: width", width, 1)
        check.integer("AttentionPooling: queries", queries, 1)
        check.integer("AttentionPooling: num_heads", num_heads, 1)
        if width % num_heads:
            raise check.error("AttentionPooling: num_heads", num_heads, f"a divisor of the width, {width}", True)
        check_probability("AttentionPooling: dropout", dropout)
        self.width, self.num_heads, self.dropout = width, num_heads, dropout
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(queries, width)))
        self.key_map = nn.Linear(width, width, bias=False)  # a bias would add the same number to all scores of a query
        self.value_map = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Mask | None = None, *, summary: Summary | None = None
    ) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Pool a sequence.

        Args:
            x: (B, S, width).
            mask: one of `regard.mask`, such as `mask.lengths(n)`. True = may attend.
            summary: which statistics of the attention weights to return.

        Returns:
            (B, width) for one query, (B, queries, width) for several. With `summary`, a pair of it and an
            `AttentionSummary`, of shapes such as (B, num_heads, queries).
        """
        check_features("AttentionPooling: x", x, "B, S", self.width)
        check_mask("AttentionPooling: mask", mask)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
            for part in (self.queries.expand(len(x), -1, -1), self.key_map(x), self.value_map(x))
        )
        result = attention(q, k, v, mask=mask, dropout=self.dropout if self.training else 0.0, summary=summary)
        out, statistics = result if isinstance(result, tuple) else (result, None)
        out = out.transpose(1, 2).flatten(2)
        out = out[:, 0] if len(self.queries) == 1 else out
        return out if statistics is None else (out, statistics)

    def extra_repr(self) -> str:
        return f"{self.width}, queries={len(self.queries)}, num_heads={self.num_heads}, dropout={self.dropout}"


class AdditivePooling(nn.Module):
    """Weighted mean of a sequence x, with weights from a network with one hidden layer:

        y = sum_j softmax(u . tanh(W x_j + b))_j x_j

    Each of several vectors u gives one mean. The result of an empty sequence is 0.

    >>> pool = regard.nn.AdditivePooling(8, hidden_width=4)
    >>> x = torch.randn(2, 5, 8)
    >>> weights = (torch.tanh(pool.map(x)) @ pool.u[0]).softmax(-1)
    >>> torch.allclose(pool(x), (weights[..., None] * x).sum(1), atol=1e-6)
    True

    Args:
        width: width of the sequence and of the result.
        hidden_width: width of the hidden layer; `width` by default.
        queries: number of vectors u.
        dropout: dropout probability of the attention weights, in training.

    Source: Yang et al., "Hierarchical Attention Networks for Document Classification" (2016), equations 5 to 7; for
    several vectors, Lin et al., "A Structured Self-attentive Sentence Embedding" (2017), equation 6.
    """

    def __init__(self, width: int, hidden_width: int | None = None, queries: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        hidden_width = width if hidden_width is None else hidden_width
        check.integer("AdditivePooling: width", width, 1)
        check.integer("AdditivePooling: hidden_width", hidden_width, 1, ", or None for the width")
        check.integer("AdditivePooling: queries", queries, 1)
        check_probability("AdditivePooling: dropout", dropout)
        self.width, self.dropout = width, dropout
        self.map = nn.Linear(width, hidden_width)
        self.u = make_vector(queries, hidden_width)

    def forward(
        self, x: Tensor, mask: Mask | None = None, *, summary: Summary | None = None
    ) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Pool a sequence.

        Args:
            x: (B, S, width).
            mask: one of `regard.mask`, such as `mask.lengths(n)`. True = may attend.
            summary: which statistics of the attention weights to return.

        Returns:
            (B, width) for one u, (B, queries, width) for several. With `summary`, a pair of it and an
            `AttentionSummary`, in which each u is a head with one query, of shapes such as (B, queries, 1).
        """
        check_features("AdditivePooling: x", x, "B, S", self.width)
        check_mask("AdditivePooling: mask", mask)
        # The queries are 0, because the additive score adds them to the keys, which include the bias b already.
        keys = self.map(x)[:, None]
        query = keys.new_zeros(1, 1, 1, 1).expand(len(x), len(self.u), 1, keys.shape[-1])
        result = attention(
            query, keys, x[:, None], score=Additive(self.u), mask=mask, summary=summary,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        out, statistics = result if isinstance(result, tuple) else (result, None)
        out = out[:, 0, 0] if len(self.u) == 1 else out[:, :, 0]
        return out if statistics is None else (out, statistics)

    def extra_repr(self) -> str:
        return f"{self.width}, queries={len(self.u)}, dropout={self.dropout}"


class KernelPooling(nn.Module):
    """Nadaraya-Watson regression: the value at a point is a mean of known values, weighted by a Gaussian of the
    distance.

        y(q) = sum_j softmax(-|q - k_j|^2 / (2 sigma^2))_j v_j

    When sigma is trained on the known points themselves, a mask must exclude each point from its own mean:

    >>> pool = regard.nn.KernelPooling(sigma=0.5)
    >>> x, y = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [2.0], [4.0]])
    >>> loss = (pool(x, x, y, ~mask.window(0, 0)) - y).square().mean()
    >>> loss.backward()
    >>> weights = torch.exp(-(torch.tensor([0.5]) - x[:, 0]) ** 2 / (2 * 0.5**2))
    >>> torch.allclose(pool(torch.tensor([[0.5]]), x, y)[0], weights @ y / weights.sum())
    True

    Args:
        sigma: width of the kernel in the units of the points; the initial width if learned.
        learned: whether to learn the logarithm of sigma.

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
        """Estimate the values at the points of the queries.

        Args:
            query: points (B, L, D) or (L, D).
            key: points with known values, (B, S, D) or (S, D).
            value: the known values, (B, S, E) or (S, E).
            mask: one of `regard.mask`. True = may attend.
            summary: which statistics of the attention weights to return.

        Returns:
            (B, L, E) or (L, E); with `summary`, a pair of it and an `AttentionSummary`. The value of a query that may
            attend to no point is 0.
        """
        fits = check.is_float_tensor(query)
        if not fits or query.dim() not in (2, 3):
            raise check.error("KernelPooling: query", query, "a float tensor of shape (B, L, D) or (L, D)", fits)
        batch, width = tuple(query.shape[:-2]), query.shape[-1]
        fits = check.is_float_tensor(key)
        if not fits or key.dim() != query.dim() or (*key.shape[:-2], key.shape[-1]) != (*batch, width):
            sizes = "".join(f"{n}, " for n in batch)
            expected = f"a float tensor of shape ({sizes}S, {width}), as query has {tuple(query.shape)}"
            raise check.error("KernelPooling: key", key, expected, fits)
        fits = check.is_float_tensor(value)
        if not fits or value.shape[:-1] != key.shape[:-1]:
            expected = (
                f"a float tensor of shape ({', '.join(map(str, key.shape[:-1]))}, E), as key has {tuple(key.shape)}"
            )
            raise check.error("KernelPooling: value", value, expected, fits)
        check_mask("KernelPooling: mask", mask)
        return attention(query, key, value, score=Gaussian(self.sigma), mask=mask, summary=summary)
