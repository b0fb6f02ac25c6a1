"""Luong's attention: three scores, over all keys or over a window that moves along with the queries."""

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
from regard.nn.memory import Memory, MemoryAttention, vector


class LuongAttention(MemoryAttention):
    """A context per query: the values, weighed by how well their keys match.

        context_i = sum_j softmax(score(query_i, key_j))_j value_j

        "dot"      query . key
        "general"  query . W_a key
        "concat"   v_a . tanh(W_a [query; key])

    Local attention looks at the keys j from p - reach to p + reach alone, where p is

        "monotonic"   i, the position of the query (local-m)
        "predictive"  S sigmoid(v_p . tanh(W_p query)), S being the length that `mask.lengths` leaves, or that of all
                      keys (local-p). Each weight is then multiplied by exp(-(j - p)^2 / (2 sigma^2)), sigma = reach / 2,
                      and a row of weights no longer sums to 1. What is held is L x S numbers per batch row.

    With `output_width`, the layer gives the attentional vector tanh(W_c [context; query]) in the place of the context.

    Args:
        query_width: of the queries (B, L, query_width).
        key_width: of the keys (B, S, key_width).
        score: "dot", "general" or "concat".
        local: "monotonic" or "predictive"; None attends to all keys.
        reach: how far a window goes to either side; D in the paper.
        output_width: of the attentional vector; None for the context.
        value_width: of the values, where they are not as wide as the keys; only an attentional vector needs it.

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
            raise check.wrong("LuongAttention: score", score, '"dot", "general" or "concat"', isinstance(score, str))
        if local not in (None, "monotonic", "predictive"):
            expected = '"monotonic", "predictive" or None'
            raise check.wrong("LuongAttention: local", local, expected, isinstance(local, str))
        check.whole("LuongAttention: reach", reach, 1)
        super().__init__(query_width, key_width, query_width if score == "concat" else key_width)
        if score == "dot" and query_width != key_width:
            expected = f'{query_width}, as query_width, for "dot" ("general" and "concat" map them)'
            raise check.wrong("LuongAttention: key_width", key_width, expected, True)
        self.score, self.local, self.reach = score, local, reach
        self.query_map = nn.Identity() if score == "dot" else nn.Linear(query_width, self.width, bias=False)
        self.key_map = nn.Linear(key_width, self.width, bias=False) if score == "concat" else nn.Identity()
        self.v = vector(query_width) if score == "concat" else None
        self.position_map = nn.Linear(query_width, query_width, bias=False) if local == "predictive" else None
        self.position_v = vector(query_width) if local == "predictive" else None
        self.output_map = None
        if output_width is not None:
            check.whole("LuongAttention: output_width", output_width, 1, ", or None for the context")
            value_width = key_width if value_width is None else value_width
            check.whole("LuongAttention: value_width", value_width, 1, ", or None for that of the keys")
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
            key: (B, S, key_width), or what `remember` made of it.
            value: (B, S, E); the keys themselves by default.
            mask: one of `regard.mask`, joined with that of the memory. True = may attend.
            start: the position of the first query, for "monotonic".
            summary: what else to tell about the weights; for "predictive", of the weights scaled to sum to 1.

        Returns:
            The context (B, L, E), or (B, E) for one step; of width `output_width` where there is one. With `summary`, a
            pair of it and `AttentionSummary`, where one step is L = 1. The context of a row that may attend to nothing is 0.
        """
        check.whole("LuongAttention: start", start, 0)
        memory = self._memory(query, key, value, mask)
        if self.output_map is not None:
            width = self.output_map.in_features - self.query_width
            if memory.values.shape[-1] != width:
                expected = f"floats of shape (B, S, {width}): that wide are the values for output_width"
                raise check.wrong("LuongAttention: value", memory.values, expected, True)
        found: Tensor | tuple[Tensor, AttentionSummary] = self._for_rows(
            query, lambda x: self._attend(x, memory, start, summary)
        )
        return found

    def extra_repr(self) -> str:
        where = "" if self.local is None else f", local={self.local!r}, reach={self.reach}"
        return f"score={self.score!r}{where}"

    def _attend(self, query: Tensor, memory: Memory, start: int, summary: Summary | None) -> Any:
        seen: AttentionSummary | None
        if self.local == "predictive":
            context, seen = self._predictive(query, memory, summary)
        else:
            if self.local == "monotonic":
                memory = memory.within(window(self.reach, self.reach, align=start))
            found = self._read(query, memory, summary)
            context, seen = found if summary is not None else (found, None)
        if self.output_map is not None:
            context = torch.tanh(self.output_map(torch.cat([context, query], -1)))
        return context if summary is None else (context, seen)

    def _predictive(self, query: Tensor, memory: Memory, summary: Summary | None) -> tuple[Tensor, AttentionSummary]:
        """With the logarithm of the Gaussian g added to the scores s, the weights are e^s g / sum(e^s g): times their sum,
        and divided by sum(e^s), they are softmax(s) g.
        """
        assert self.position_map is not None and self.position_v is not None
        place = torch.arange(memory.keys.shape[1], device=query.device)
        hidden = widen(torch.tanh(self.position_map(query)))
        share = torch.sigmoid((hidden * self.position_v.to(hidden.dtype)).sum(-1))
        off = place - (_lengths(memory.mask, place).view(-1, 1) * share)[..., None]
        memory = memory.within(dense((off.detach().abs() <= self.reach)[:, None]))
        asked = replace(summary or Summary(), lse=True)
        context, seen = self._read(query, memory, asked, bias=-2.0 * (off / self.reach).square())
        log_sum = self._log_sum_exp(query, memory)
        # Where there is no key, both logarithms are -inf, and the context is 0 as it is.
        empty = log_sum == -torch.inf
        factor = (seen.lse.masked_fill(empty, 0.0) - log_sum.masked_fill(empty, 0.0)).exp()
        context = (context * factor[..., None]).to(context.dtype)
        return context, seen if summary is not None and summary.lse else seen._replace(lse=None)

    def _log_sum_exp(self, query: Tensor, memory: Memory) -> Tensor:
        """Of the scores alone, (B, L)."""
        nothing = memory.keys.new_zeros(1, memory.keys.shape[1], 1)
        _, seen = self._read(query, memory._replace(values=nothing), Summary(lse=True))
        return seen.lse  # type: ignore[no-any-return]

    def _score(self) -> Score:
        return Dot() if self.v is None else Additive(self.v)


def _lengths(mask: Mask | None, place: Tensor) -> Tensor:
    """How many of the keys at `place` (S,) are there, per batch row or for all: (B,), (1,) or ()."""
    if isinstance(mask, And):
        return torch.minimum(_lengths(mask.left, place), _lengths(mask.right, place))
    S = place.shape[0]
    return mask.n.clamp(0, S) if isinstance(mask, Before) else torch.full((), S, device=place.device)
