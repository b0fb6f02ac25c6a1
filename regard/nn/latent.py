"""Multi-head latent attention: keys and values from a narrow vector per token, which is all that a cache keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard import check
from regard.attention import attention
from regard.components.mask import Mask, window
from regard.components.normalizer import Normalizer
from regard.components.position import Rotary
from regard.components.score import ScaledDot
from regard.components.summary import Summary
from regard.nn.cache import KeyValueCache
from regard.nn.component import ComponentModule

_NAME = "LatentAttention"


class LatentAttention(nn.Module):
    """Self-attention whose keys and values are mapped from a latent vector of kv_rank numbers per token. Positions are told
    by a part of each key that is turned, and that all heads share.

        latent c_j = norm(W^DKV x_j)      keys [W_h^UK c_j, rotary(W^KR x_j)]      values W_h^UV c_j
        queries [W_h^UQ c'_i, rotary(W_h^QR c'_i)]      c'_i = norm(W^DQ x_i) with query_rank, x_i without

    A cache holds kv_rank + position.width numbers per token. Where it pays, as in decoding, keys and values are not made of
    them: W_h^UK goes to the queries and W_h^UV to the output, and attention runs over the latents, as one head of keys.

    Args:
        embed_dim: the width of tokens, of input and output.
        num_heads: how many heads.
        kv_rank: the width of a latent.
        position: turns the shared part of the keys, and as much of each query; its width is that of this part.
        head_dim: the width of the other part of queries and keys; embed_dim / num_heads by default.
        value_dim: the width of a head's values; head_dim by default.
        query_rank: the width of a latent that queries are mapped from; without one they are mapped from the token.
        dropout: the chance that a weight is dropped in training.
        bias: do the maps from tokens to latents, and the output map, add one?
        scale: of the scores; 1 / sqrt(head_dim + position.width) by default.
        normalizer: one of `regard.normalizer`; softmax by default.

    The parameters have the names that they have in DeepSeek's models, and in Hugging Face's.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1; the norms are those of its section 3.1.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kv_rank: int,
        *,
        position: Rotary,
        head_dim: int | None = None,
        value_dim: int | None = None,
        query_rank: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        scale: float | None = None,
        normalizer: Normalizer | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.whole(f"{_NAME}: embed_dim", embed_dim, 1)
        check.whole(f"{_NAME}: num_heads", num_heads, 1)
        check.whole(f"{_NAME}: kv_rank", kv_rank, 1)
        if not isinstance(position, Rotary):
            raise check.wrong(f"{_NAME}: position", position, "a position.Rotary", False)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"{_NAME}: embed_dim is {embed_dim}; expected a multiple of num_heads, {num_heads}, or head_dim"
            )
        self.embed_dim, self.num_heads, self.kv_rank, self.dropout = embed_dim, num_heads, kv_rank, dropout
        self.position = position
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.value_dim = self.head_dim if value_dim is None else value_dim
        check.whole(f"{_NAME}: head_dim", self.head_dim, 1)
        check.whole(f"{_NAME}: value_dim", self.value_dim, 1)
        width = self.head_dim + position.width
        self.scale = width**-0.5 if scale is None else scale
        if scale is not None:
            check.finite(f"{_NAME}: scale", scale, ", or None")
        if normalizer is not None and not isinstance(normalizer, Normalizer):
            raise check.wrong(f"{_NAME}: normalizer", normalizer, "one of regard.normalizer", False)
        self.normalizer = None if normalizer is None else ComponentModule(normalizer)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if query_rank is None:
            self.q_proj = nn.Linear(embed_dim, num_heads * width, bias=False, **where)
        else:
            check.whole(f"{_NAME}: query_rank", query_rank, 1)
            self.q_a_proj = nn.Linear(embed_dim, query_rank, bias=bias, **where)
            self.q_a_layernorm = nn.RMSNorm(query_rank, 1e-6, **where)
            self.q_b_proj = nn.Linear(query_rank, num_heads * width, bias=False, **where)
        self.query_rank = query_rank
        self.kv_a_proj_with_mqa = nn.Linear(embed_dim, kv_rank + position.width, bias=bias, **where)
        self.kv_a_layernorm = nn.RMSNorm(kv_rank, 1e-6, **where)
        self.kv_b_proj = nn.Linear(kv_rank, num_heads * (self.head_dim + self.value_dim), bias=False, **where)
        self.o_proj = nn.Linear(num_heads * self.value_dim, embed_dim, bias=bias, **where)

    def forward(
        self,
        x: Tensor,
        mask: Mask | None = None,
        *,
        summary: Summary | None = None,
        cache: KeyValueCache | None = None,
    ) -> Any:
        """Attend.

        Args:
            x: (B, L, embed_dim), or with other axes before (L, embed_dim).
            mask: one of `regard.mask`, such as `mask.causal()`.
            summary: what to tell of the weights.
            cache: the tokens of earlier calls; the new ones stand after them. Masks count keys from the first.

        Returns:
            (B, L, embed_dim); with `summary`, a pair of it and `AttentionSummary`.
        """
        fits = check.is_floats(x)
        if not fits or x.dim() < 3 or x.shape[-1] != self.embed_dim:
            raise check.wrong(f"{_NAME}: x", x, f"floats of shape (B, L, {self.embed_dim})", fits)
        dtype = self.kv_b_proj.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{_NAME}: x has dtype {x.dtype} but the layer has {dtype}; expected the same")
        rank, width, past = self.kv_rank, self.position.width, 0 if cache is None else cache.length
        q, turned = torch.split(self._queries(x), [self.head_dim, width], -1)
        latents, shared = torch.split(self.kv_a_proj_with_mqa(x)[..., None, :, :], [rank, width], -1)
        turned, shared = self.position(turned, shared, start=past)
        tokens = torch.cat([self.kv_a_layernorm(latents), shared], -1)  # (B, 1, L, rank + width)
        if cache is not None:
            tokens, _ = cache.append(tokens, tokens[..., :0])
            if past and mask is not None:
                mask = mask & window(align="end")  # it forbids nothing, and tells where the queries stand
        latents, shared = torch.split(tokens, [rank, width], -1)

        absorbed = self._is_absorbed(x.shape[-2], tokens.shape[-2])
        both = [self.head_dim, self.value_dim]
        to_keys, to_values = torch.split(self.kv_b_proj.weight.view(self.num_heads, sum(both), rank), both, 1)
        if absorbed:
            q, k, v = torch.einsum("...hld, hdr -> ...hlr", q, to_keys), tokens, latents
        else:
            k, v = torch.split(self._heads(self.kv_b_proj(latents[..., 0, :, :])), both, -1)
            k = torch.cat([k, shared.expand(*k.shape[:-1], -1)], -1)
        words: dict[str, Any] = {
            "score": ScaledDot(self.scale),
            "normalizer": None if self.normalizer is None else self.normalizer(),
            "dropout": self.dropout if self.training else 0.0,
        }
        found: Any = attention(torch.cat([q, turned], -1), k, v, mask=mask, summary=summary, **words)
        out, seen = (found, None) if summary is None else found
        if absorbed:
            out = torch.einsum("...hlr, hvr -> ...hlv", out, to_values)
        out = self.o_proj(out.transpose(-3, -2).flatten(-2))
        return out if summary is None else (out, seen)

    def _queries(self, x: Tensor) -> Tensor:
        """Both parts of the queries, (B, H, L, head_dim + width), not turned yet."""
        if self.query_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return self._heads(q)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, H * D) as (B, H, L, D), a view."""
        return x.view(*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads).transpose(-3, -2)

    def _is_absorbed(self, L: int, S: int) -> bool:
        """Is it less work to map L queries and outputs to and from the latents than S latents to keys and values, although
        the products of attention are wider then?
        """
        both = self.head_dim + self.value_dim
        return L * self.kv_rank * both + L * S * (2 * self.kv_rank - both) < S * self.kv_rank * both
