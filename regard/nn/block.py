"""The block of attention in a transformer: multi-head attention, what it adds to, and the norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard import check
from regard.components.mask import Mask, dense
from regard.components.summary import Summary
from regard.nn.cache import KeyValueCache
from regard.nn.multihead import MultiheadAttention


class AttentionBlock(nn.Module):
    """Multi-head attention, added to the query, and a layer norm; batch first.

        norm="post":  LayerNorm(query + dropout(MultiheadAttention(query, key, value)))
        norm="pre":   query + dropout(MultiheadAttention(LayerNorm(query), key, value))

    In self-attention, key and value are what the query is: with norm="pre", they are normed as well.

    Args:
        d_model: the width of queries, keys, values and the output.
        num_heads: a divisor of d_model.
        dropout: the chance, in training, that a weight of attention is dropped, and that a number of its output is.
        norm: "post", as in the paper, or "pre", which trains deep stacks more steadily.
        words: what else `MultiheadAttention` takes: score, normalizer, position, softcap, kv_heads, bias, kdim, ...

    >>> block = AttentionBlock(512, 8, position=position.ALiBi())
    >>> out, seen = block(x, mask=mask.causal(), summary=Summary(top=8))

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.1; "pre": Xiong et al., "On Layer Normalization in
    the Transformer Architecture" (2020), figure 1.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1, *, norm: str = "post", **words: Any) -> None:
        super().__init__()
        if norm not in ("post", "pre"):
            raise check.wrong("AttentionBlock: norm", norm, '"post" or "pre"', isinstance(norm, str))
        self.pre = norm == "pre"
        self.attention = MultiheadAttention(d_model, num_heads, dropout, batch_first=True, **words)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(d_model, device=words.get("device"), dtype=words.get("dtype"))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Mask | Tensor | None = None,
        *,
        summary: Summary | None = None,
        cache: KeyValueCache | None = None,
    ) -> Any:
        """Attend.

        Args:
            query: (B, L, d_model).
            key: (B, S, d_model); query by default: self-attention.
            value: (B, S, d_model); key by default.
            mask: one of `regard.mask`, or a tensor that broadcasts to (B, num_heads, L, S), as (L, S) and (B, 1, L, S) do:
                bools, or numbers that are 0 or 1; False and 0 = may not attend.
            summary: what to tell of the weights.
            cache: as in `MultiheadAttention`.

        Returns:
            (B, L, d_model); with `summary`, a pair of it and `AttentionSummary`.
        """
        x = self.norm(query) if self.pre else query
        key, value = (x if other is query else other for other in (key, value))
        out, seen = self.attention(x, key, value, need_weights=False, mask=_as_mask(mask), summary=summary, cache=cache)
        out = query + self.dropout(out)
        out = out if self.pre else self.norm(out)
        return out if summary is None else (out, seen)


def _as_mask(mask: Mask | Tensor | None) -> Mask | None:
    """A tensor of bools, or of 0 and 1, as a mask."""
    if mask is None or isinstance(mask, Mask):
        return mask
    name, fits = "AttentionBlock: mask", isinstance(mask, Tensor)
    expected = "one of regard.mask, or a tensor of bools or of 0 and 1, False and 0 = may not attend"
    if not fits or mask.is_complex() or mask.dim() > 4:
        raise check.wrong(name, mask, expected, fits)
    if mask.dtype != torch.bool:
        if not torch.compiler.is_compiling() and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{name} holds other numbers; expected {expected}")
        mask = mask != 0
    return dense(mask)
