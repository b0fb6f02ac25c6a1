"""Luong attention: three scores, over all keys (global) or over a moving window (local)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard import check
from regard.components.mask import And, Before, Mask, dense, window
from regard.components.score import Additive, Dot, Score
from regard.components.summary import AttentionSummary, Summary
from regard.components.tensor_ops import widen
from regard.nn.memory import Memory, MemoryAttention, make_vector


class LuongAttention(MemoryAttention):
    """Luong attention: the context of a query is a weighted sum of the values.

        context_i = sum_j softmax(score(query_i, key_j))_j value_j

        "dot"      query . key
        "general"  query . W_a key
        "concat"   v_a . tanh(W_a [query; key])

    Local attention attends only to the keys j with p - reach <= j <= p + reach, where p is

        "monotonic"   i, the position of the query (local-m)
        "predictive"  S sigmoid(v_p . tanh(W_p query)) (local-p), where S is the length from `mask.lengths`, or the
                      number of keys. Each weight is multiplied by exp(-(j - p)^2 / (2 sigma^2)), sigma = reach / 2,
                      so that the weights of a query no longer sum to 1. This materializes L x S elements per batch row.

    With `output_width`, the layer returns the attentional vector tanh(W_c [context; query]) instead of the context.

    >>> layer = regard.nn.LuongAttention(4, 4, "dot", local="monotonic", reach=1)
    >>> x = torch.randn(2, 5, 4)
    >>> context, statistics = layer(x, x, summary=Summary(full=True))
    >>> context.shape, (statistics.full[0] > 0).int().tolist()[2]  # query 2 attends to keys 1 to 3
    (torch.Size([2, 5, 4]), [0, 1, 1, 1, 0])
    >>> torch.allclose(context[0, 0], (x[0, :2] @ x[0, 0]).softmax(-1) @ x[0, :2])
    True

    Args:
        query_width: width of the queries (B, L, query_width).
        key_width: width of the keys (B, S, key_width).
        score: "dot", "general" or "concat".
        local: "monotonic" or "predictive"; None for global attention.
        reach: number of keys that a window extends to either side of p; D in the paper.
        output_width: width of the attentional vector; None to return the context.
        value_width: width of the values, for the attentional vector; key_width by default.

    Source: Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine Translation" (2015),
    equations 5 to 10.
    """

    def __init__(
        self,
        query_width: int,
        key_width: int,
        score: Literal["dot", "general", "concat"] = "general",
        *,
        local: Literal["monotonic", "predictive"] | None = None,
        reach: int = 10,
        output_width: int | None = None,
        value_width: int | None = None,
    ) -> None:
        if score not in ("dot", "general", "concat"):
            raise check.error("LuongAttention: score", score, '"dot", "general" or "concat"', isinstance(score, str))
        if local not in (None, "monotonic", "predictive"):
            expected = '"monotonic", "predictive" or None'
            raise check.error("LuongAttention: local", local, expected, isinstance(local, str))
        check.integer("LuongAttention: reach", reach, 1)
        super().__init__(query_width, key_width, query_width if score == "concat" else key_width)
        if score == "dot" and query_width != key_width:
            expected = f'{query_width}, as query_width, for "dot" ("general" and "concat" project them)'
            raise check.error("LuongAttention: key_width", key_width, expected, True)
        self.score, self.local, self.reach = score, local, reach
        self.query_map = nn.Identity() if score == "dot" else nn.Linear(query_width, self.width, bias=False)
        self.key_map = nn.Linear(key_width, self.width, bias=False) if score == "concat" else nn.Identity()
        self.v = make_vector(query_width) if score == "concat" else None
        self.position_map = nn.Linear(query_width, query_width, bias=False) if local == "predictive" else None
        self.position_v = make_vector(query_width) if local == "predictive" else None
        self.output_map = None
        if output_width is not None:
            check.integer("LuongAttention: output_width", output_width, 1, ", or None for the context")
            value_width = key_width if value_width is None else value_width
            check.integer("LuongAttention: value_width", value_width, 1, ", or None for key_width")
            self.output_map = nn.Linear(value_width + query_width, output_width, bias=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor | Memory,
        value: Tensor | None = None,
        mask: Mask | None = None,
        *,
        start: int = 0,
        summary: Summary | None = None,
    ) -> Tensor | tuple[Tensor, AttentionSummary]:
        """Attend to a memory.

        Args:
            query: (B, L, query_width), or (B, query_width) for one step.
            key: (B, S, key_width), or a `Memory` from `remember`.
            value: (B, S, E); `key` by default.
            mask: one of `regard.mask`, combined by AND with the mask of the memory. True = may attend.
            start: position of the first query, for "monotonic".
            summary: which statistics of the attention weights to return; for "predictive", of the weights normalized to
                sum to 1.

        Returns:
            The context (B, L, E), or (B, E) for one step; with `output_width`, the attentional vector of that width.
            With `summary`, a pair of it and an `AttentionSummary`, in which one step has L = 1. The context of a query
            that may attend to no key is 0.
        """
        check.integer("LuongAttention: start", start, 0)
        memory = self._prepare_memory(query, key, value, mask)
        if self.output_map is not None:
            width = self.output_map.in_features - self.query_width
            if memory.values.shape[-1] != width:
                expected = f"a float tensor of shape (B, S, {width}), as value_width is {width}"
                raise check.error("LuongAttention: value", memory.values, expected, True)
        out: Tensor | tuple[Tensor, AttentionSummary] = self._with_query_axis(
            query, lambda x: self._attend(x, memory, start, summary)
        )
        return out

    def extra_repr(self) -> str:
        local = "" if self.local is None else f", local={self.local!r}, reach={self.reach}"
        return f"score={self.score!r}{local}"

    def _attend(self, query: Tensor, memory: Memory, start: int, summary: Summary | None) -> Any:
        statistics: AttentionSummary | None
        if self.local == "predictive":
            context, statistics = self._attend_predictive(query, memory, summary)
        else:
            if self.local == "monotonic":
                memory = memory.within(window(self.reach, self.reach, align=start))
            out = self._attend_memory(query, memory, summary)
            context, statistics = out if summary is not None else (out, None)
        if self.output_map is not None:
            context = torch.tanh(self.output_map(torch.cat([context, query], -1)))
        return context if summary is None else (context, statistics)

    def _attend_predictive(
        self, query: Tensor, memory: Memory, summary: Summary | None
    ) -> tuple[Tensor, AttentionSummary]:
        """Attend to a predicted window (local-p).

        Adding log g, the logarithm of the Gaussian, to the scores s gives the weights e^s g / sum(e^s g). Multiplying
        the context by sum(e^s g) / sum(e^s) turns them into softmax(s) g.
        """
        assert self.position_map is not None and self.position_v is not None
        positions = torch.arange(memory.keys.shape[1], device=query.device)
        hidden = widen(torch.tanh(self.position_map(query)))
        fraction = torch.sigmoid((hidden * self.position_v.to(hidden.dtype)).sum(-1))
        offset = positions - (_key_lengths(memory.mask, positions).view(-1, 1) * fraction)[..., None]
        memory = memory.within(dense((offset.detach().abs() <= self.reach)[:, None]))
        context, statistics = self._attend_memory(
            query, memory, replace(summary or Summary(), lse=True), bias=-2.0 * (offset / self.reach).square()
        )
        log_sum = self._log_sum_exp(query, memory)
        # Without keys both logarithms are -inf, and the context is 0 already.
        empty = log_sum == -torch.inf
        factor = (statistics.lse.masked_fill(empty, 0.0) - log_sum.masked_fill(empty, 0.0)).exp()
        context = (context * factor[..., None]).to(context.dtype)
        return context, statistics if summary is not None and summary.lse else statistics._replace(lse=None)

    def _log_sum_exp(self, query: Tensor, memory: Memory) -> Tensor:
        """Return the log-sum-exp (B, L) of the scores without bias."""
        zeros = memory.keys.new_zeros(1, memory.keys.shape[1], 1)
        _, statistics = self._attend_memory(query, memory._replace(values=zeros), Summary(lse=True))
        return statistics.lse  # type: ignore[no-any-return]

    def _score(self) -> Score:
        return Dot() if self.v is None else Additive(self.v)


def _key_lengths(mask: Mask | None, positions: Tensor) -> Tensor:
    """Return the number of keys that `mask.lengths` leaves of the keys at `positions` (S,): shape (B,), (1,) or ()."""
    if isinstance(mask, And):
        return torch.minimum(_key_lengths(mask.left, positions), _key_lengths(mask.right, positions))
    S = positions.shape[0]
    return mask.n.clamp(0, S) if isinstance(mask, Before) else torch.full((), S, device=positions.device)
