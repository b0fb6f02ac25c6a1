"""The attention block of a transformer: multi-head attention, residual connection and layer norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard import check
from regard.components.mask import Mask, dense
from regard.components.summary import Summary
from regard.nn.cache import KeyValueCache
from regard.nn.multihead import MultiheadAttention
from regard.tracing import has_values


class AttentionBlock(nn.Module):
    """Multi-head attention with residual connection and layer norm. Batch first.

        norm="post":  LayerNorm(query + dropout(MultiheadAttention(query, key, value)))
        norm="pre":   query + dropout(MultiheadAttention(LayerNorm(query), key, value))

    In self-attention with norm="pre", key and value are the normalized query.

    Args:
        d_model: width of queries, keys, values and output.
        num_heads: number of heads, a divisor of d_model.
        dropout: dropout probability in training, of the attention weights and of the elements of the attention output.
        norm: "post", as in the paper, or "pre", which makes deep stacks train more stably.
        words: further arguments of `MultiheadAttention`: score, normalizer, position, softcap, kv_heads, bias, ...

    >>> block = regard.nn.AttentionBlock(16, 4, norm="pre", position=position.ALiBi()).eval()
    >>> x = torch.randn(2, 5, 16)
    >>> out, statistics = block(x, mask=mask.causal(), summary=Summary(top=2))
    >>> out.shape, statistics.top.keys.shape
    (torch.Size([2, 5, 16]), torch.Size([2, 4, 5, 2]))
    >>> torch.allclose(out, x + block.attention(block.norm(x), mask=mask.causal())[0], atol=1e-6)
    True

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.1; "pre": Xiong et al., "On Layer
    Normalization in the Transformer Architecture" (2020), figure 1.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1, *, norm: str = "post", **words: Any) -> None:
        super().__init__()
        if norm not in ("post", "pre"):
            raise check.error("AttentionBlock: norm", norm, '"post" or "pre"', isinstance(norm, str))
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
            key: (B, S, d_model); `query` by default (self-attention).
            value: (B, S, d_model); `key` by default.
            mask: one of `regard.mask`, or a tensor that broadcasts to (B, num_heads, L, S), such as (L, S) or (B, 1, L,
                S). Its elements are bools, or 0 and 1. True or 1 = may attend.
            summary: which statistics of the attention weights to return.
            cache: as in `MultiheadAttention`.

        Returns:
            (B, L, d_model); with `summary`, a pair of it and an `AttentionSummary`.
        """
        x = self.norm(query) if self.pre else query
        key, value = (x if other is query else other for other in (key, value))
        attended, statistics = self.attention(
            x, key, value, need_weights=False, mask=_to_mask(mask), summary=summary, cache=cache
        )
        out = query + self.dropout(attended)
        out = out if self.pre else self.norm(out)
        return out if summary is None else (out, statistics)


def _to_mask(mask: Mask | Tensor | None) -> Mask | None:
    """Convert a tensor of bools, or of 0 and 1, to a mask."""
    if mask is None or isinstance(mask, Mask):
        return mask
    name, fits = "AttentionBlock: mask", isinstance(mask, Tensor)
    expected = "one of regard.mask, or a tensor of bools or of 0 and 1 (True or 1 = may attend)"
    if not fits or mask.is_complex() or mask.dim() > 4:
        raise check.error(name, mask, expected, fits)
    if mask.dtype != torch.bool:
        if has_values(mask) and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{name} has elements other than 0 and 1; expected {expected}")
        mask = mask != 0
    return dense(mask)
