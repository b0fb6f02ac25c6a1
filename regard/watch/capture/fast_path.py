"""Torch's fast path: whole layers in one operator, which tells nothing. What they attend to is computed beside them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from regard.attention import attention
from regard.components import mask as masks
from regard.components.mask import Mask
from regard.watch.capture import nested
from regard.watch.capture.recorder import Ask, aside
from regard.watch.capture.softmax import looks_causal

# The type of a mask that is padding, (B, S); others are (L, S) or (B, H, L, S).
_PADDING = 1
_FEW = 8  # values that are looked at by nobody


def tell_layer(
    ask: Ask,
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    *rest: Any,
) -> None:
    """Tell what a call of `torch._transformer_encoder_layer_fwd` attends to."""
    mask, kind = rest[6:8] if len(rest) > 6 else (None, None)
    x = src
    if norm_first:
        x = F.layer_norm(src, (embed_dim,), norm_weight_1, norm_bias_1, eps)
    _tell(ask, "self_attn", x, x, num_heads, qkv_weight, qkv_bias, mask, kind)


def tell_attention(
    ask: Ask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> None:
    """Tell what a call of `torch._native_multi_head_attention` attends to."""
    _tell(ask, "", query, key, num_head, qkv_weight, qkv_bias, mask, mask_type)


def _tell(
    ask: Ask,
    within: str,
    query: Tensor,
    key: Tensor,
    heads: int,
    weight: Tensor,
    bias: Tensor | None,
    mask: Any,
    kind: Any,
) -> None:
    summary = ask.wanted(within)
    if summary is None:
        return
    with aside():
        may: Mask | None = None
        causal = False
        if mask is not None:
            allowed = ~mask.bool()  # torch's True forbids
            causal = kind != _PADDING and looks_causal(allowed)
            may = masks.dense(allowed[:, None, None] if kind == _PADDING else allowed)
        if query.is_nested:
            # What is padded comes back, and attends to nothing.
            found = nested.padded(query)
            if found is None:
                return
            query, n = found
            key, may = query, nested.within(n, n, query.shape[1], query.shape[1])
        width = weight.shape[1]
        biases = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
        q, k = (
            F.linear(x, some, b).view(*x.shape[:2], heads, -1).transpose(1, 2)
            for x, some, b in zip((query, key), weight.chunk(3), biases, strict=False)
        )
        _, seen = attention(q, k, k[..., :_FEW], mask=may, summary=summary)
    B, H, L, _ = q.shape
    ask.tell(seen, (B, H, L, k.shape[2]), causal)
