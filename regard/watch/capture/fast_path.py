"""Torch's fast path, which computes a layer in one operator. The summaries are computed separately from its inputs."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from regard import nested
from regard.attention import attention
from regard.components import mask as masks
from regard.components.mask import Mask
from regard.watch.capture.recorder import Recorder, untracked
from regard.watch.capture.softmax import is_causal_mask

# `mask_type` of a padding mask (B, S); other masks are (L, S) or (B, H, L, S).
_PADDING = 1
# Width of the values; small, since the output is not used.
_VALUE_WIDTH = 8


def record_layer(
    recorder: Recorder,
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
    """Record the attention of a call of `torch._transformer_encoder_layer_fwd`."""
    mask, mask_type = rest[6:8] if len(rest) > 6 else (None, None)
    x = src
    if norm_first:
        x = F.layer_norm(src, (embed_dim,), norm_weight_1, norm_bias_1, eps)
    _record(recorder, "self_attn", x, x, num_heads, qkv_weight, qkv_bias, mask, mask_type)


def record_attention(
    recorder: Recorder,
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
    """Record the attention of a call of `torch._native_multi_head_attention`."""
    _record(recorder, "", query, key, num_head, qkv_weight, qkv_bias, mask, mask_type)


def _record(
    recorder: Recorder,
    submodule: str,
    query: Tensor,
    key: Tensor,
    heads: int,
    weight: Tensor,
    bias: Tensor | None,
    mask: Any,
    mask_type: Any,
) -> None:
    if not recorder.should_record(submodule):
        return
    with untracked():
        allowed_mask: Mask | None = None
        is_causal = False
        if mask is not None:
            allowed = ~mask.bool()  # torch masks where it is True
            is_causal = mask_type != _PADDING and is_causal_mask(allowed)
            allowed_mask = masks.dense(allowed[:, None, None] if mask_type == _PADDING else allowed)
        if query.is_nested:
            padded = nested.to_padded(query)
            if padded is None:
                return
            query, lengths = padded
            key = query
            allowed_mask = nested.length_mask(lengths, lengths, query.shape[1], query.shape[1])
        width = weight.shape[1]
        biases = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
        q, k = (
            F.linear(x, w, b).view(*x.shape[:2], heads, -1).transpose(1, 2)
            for x, w, b in zip((query, key), weight.chunk(3), biases, strict=False)
        )
        _, summary = attention(q, k, k[..., :_VALUE_WIDTH], mask=allowed_mask, summary=recorder.summary)
    B, H, L, _ = q.shape
    recorder.record(summary, (B, H, L, k.shape[2]), is_causal)
