"""Multi-head latent attention: keys and values are projections of one narrow, cached vector per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard import check
from regard.attention import attention
from regard.components.mask import Band, Mask
from regard.components.normalizer import Normalizer
from regard.components.position import Rotary
from regard.components.score import ScaledDot
from regard.components.summary import Summary
from regard.nn.cache import KeyValueCache
from regard.nn.component import ComponentModule

_NAME = "LatentAttention"


class LatentAttention(nn.Module):
    """Multi-head latent attention (MLA): self-attention whose keys and values are projected from a latent vector of
    width kv_rank per token. Positions enter by a rotary part of each key, which all heads share.

        latent c_j = norm(W^DKV x_j)      keys [W_h^UK c_j, rotary(W^KR x_j)]      values W_h^UV c_j
        queries [W_h^UQ c'_i, rotary(W_h^QR c'_i)]      c'_i = norm(W^DQ x_i) with query_rank, x_i without

    A cache holds kv_rank + position.width elements per token. Where it costs less, as in decoding, keys and values are
    not materialized: W_h^UK is absorbed into the queries and W_h^UV into the output, and attention runs over the
    latents as a single key head.

    >>> layer = regard.nn.LatentAttention(16, 4, kv_rank=6, position=position.Rotary(2))
    >>> x = torch.randn(2, 5, 16)
    >>> whole = layer(x, mask.causal())
    >>> cache = regard.nn.KeyValueCache()
    >>> for token in x.split(1, 1):
    ...     out = layer(token, cache=cache)
    >>> cache.keys.shape, torch.allclose(out, whole[:, 4:], atol=1e-6)
    (torch.Size([2, 1, 5, 8]), True)

    Args:
        embed_dim: width of input and output.
        num_heads: number of heads.
        kv_rank: width of a latent.
        position: rotary embedding of the shared part of the keys and the same part of each query; its width is the
            width of this part.
        head_dim: width of the other part of queries and keys; embed_dim / num_heads by default.
        value_dim: width of the values of one head; head_dim by default.
        query_rank: width of a latent that queries are projected from; by default they are projected from the token.
        dropout: dropout probability of the attention weights, in training.
        bias: whether the projections from tokens to latents and the output projection have a bias.
        scale: scale of the scores; 1 / sqrt(head_dim + position.width) by default.
        normalizer: one of `regard.normalizer`; softmax by default.

    Parameters are named as in DeepSeek's models and their Hugging Face implementations.

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
        check.integer(f"{_NAME}: embed_dim", embed_dim, 1)
        check.integer(f"{_NAME}: num_heads", num_heads, 1)
        check.integer(f"{_NAME}: kv_rank", kv_rank, 1)
        if not isinstance(position, Rotary):
            raise check.error(f"{_NAME}: position", position, "a position.Rotary", False)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"{_NAME}: embed_dim is {embed_dim}; expected a multiple of num_heads, {num_heads}, or head_dim"
            )
        self.embed_dim, self.num_heads, self.kv_rank, self.dropout = embed_dim, num_heads, kv_rank, dropout
        self.position = position
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.value_dim = self.head_dim if value_dim is None else value_dim
        check.integer(f"{_NAME}: head_dim", self.head_dim, 1)
        check.integer(f"{_NAME}: value_dim", self.value_dim, 1)
        width = self.head_dim + position.width
        self.scale = width**-0.5 if scale is None else scale
        if scale is not None:
            check.finite(f"{_NAME}: scale", scale, ", or None")
        if normalizer is not None and not isinstance(normalizer, Normalizer):
            raise check.error(f"{_NAME}: normalizer", normalizer, "one of regard.normalizer", False)
        self.normalizer = None if normalizer is None else ComponentModule(normalizer)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if query_rank is None:
            self.q_proj = nn.Linear(embed_dim, num_heads * width, bias=False, **where)
        else:
            check.integer(f"{_NAME}: query_rank", query_rank, 1)
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
            x: (B, L, embed_dim), or with other leading dimensions.
            mask: one of `regard.mask`, such as `mask.causal()`.
            summary: which statistics of the attention weights to return.
            cache: the tokens of earlier calls, to which the new ones are appended. Masks count keys from the first
                cached one.

        Returns:
            (B, L, embed_dim); with `summary`, a pair of it and an `AttentionSummary`.
        """
        fits = check.is_float_tensor(x)
        if not fits or x.dim() < 3 or x.shape[-1] != self.embed_dim:
            raise check.error(f"{_NAME}: x", x, f"a float tensor of shape (B, L, {self.embed_dim})", fits)
        dtype = self.kv_b_proj.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{_NAME}: x has dtype {x.dtype} but the layer has {dtype}; expected the same")
        rank, width, past = self.kv_rank, self.position.width, 0 if cache is None else cache.length
        q, q_rotary = torch.split(self._queries(x), [self.head_dim, width], -1)
        latents, shared = torch.split(self.kv_a_proj_with_mqa(x)[..., None, :, :], [rank, width], -1)
        q_rotary, shared = self.position(q_rotary, shared, start=past)
        tokens = torch.cat([self.kv_a_layernorm(latents), shared], -1)  # (B, 1, L, rank + width)
        if cache is not None:
            tokens, _ = cache.append(tokens, tokens[..., :0])
            if past and mask is not None:
                mask = mask & Band(None, None, past)  # allows everything; sets the alignment of the queries
        latents, shared = torch.split(tokens, [rank, width], -1)

        absorb = self._is_absorption_cheaper(x.shape[-2], tokens.shape[-2])
        widths = [self.head_dim, self.value_dim]
        to_keys, to_values = torch.split(self.kv_b_proj.weight.view(self.num_heads, sum(widths), rank), widths, 1)
        if absorb:
            q, k, v = torch.einsum("...hld, hdr -> ...hlr", q, to_keys), tokens, latents
        else:
            k, v = torch.split(self._split_heads(self.kv_b_proj(latents[..., 0, :, :])), widths, -1)
            k = torch.cat([k, shared.expand(*k.shape[:-1], -1)], -1)
        arguments: dict[str, Any] = {
            "score": ScaledDot(self.scale),
            "normalizer": None if self.normalizer is None else self.normalizer(),
            "dropout": self.dropout if self.training else 0.0,
        }
        result: Any = attention(torch.cat([q, q_rotary], -1), k, v, mask=mask, summary=summary, **arguments)
        out, statistics = (result, None) if summary is None else result
        if absorb:
            out = torch.einsum("...hlr, hvr -> ...hlv", out, to_values)
        out = self.o_proj(out.transpose(-3, -2).flatten(-2))
        return out if summary is None else (out, statistics)

    def _queries(self, x: Tensor) -> Tensor:
        """Return the queries (B, H, L, head_dim + width), before the rotary embedding."""
        if self.query_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return self._split_heads(q)

    def _split_heads(self, x: Tensor) -> Tensor:
        """Return a view of (B, L, H * D) as (B, H, L, D)."""
        return x.view(*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads).transpose(-3, -2)

    def _is_absorption_cheaper(self, L: int, S: int) -> bool:
        """Return whether absorption needs fewer operations: it projects L queries and outputs instead of S keys and
        values, but the matrix products of attention have width kv_rank instead of the width of a head.
        """
        width = self.head_dim + self.value_dim
        return L * self.kv_rank * width + L * S * (2 * self.kv_rank - width) < S * self.kv_rank * width
