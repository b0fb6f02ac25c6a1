"""Layers on nested tensors: their sequences are padded, and the padding is masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.components.mask import Mask
from regard.nested import length_mask, to_padded


def attend_nested(
    layer: Callable[..., tuple[Tensor, Any]],
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    mask: Mask | None,
    is_causal: bool,
    **arguments: Any,
) -> tuple[Tensor, Any]:
    """Call an attention layer with nested queries (B, L, E), keys and values (B, S, E), or some of these nested.

    Returns:
        The output, nested as the queries are; and what else the layer returns, padded to the longest sequences.
    """
    key = query if key is None else key
    value = key if value is None else value
    q, queries = _padded("query", query)
    k, keys = (q, queries) if key is query else _padded("key", key)
    v, values = (k, keys) if value is key else _padded("value", value)
    for name, lengths, expected in (("key", keys, queries), ("value", values, keys)):
        if len(lengths) != len(expected):
            raise ValueError(f"MultiheadAttention: {name} has {len(lengths)} sequences; expected {len(expected)}")
    if not torch.equal(keys, values):
        raise ValueError(
            "MultiheadAttention: the sequences of value are not as long as those of key; expected the same"
        )
    if (mask is not None or is_causal) and not torch.equal(queries, keys):
        expected_form = "no mask and is_causal=False, or padded tensors and a mask that is aligned per sequence"
        raise ValueError(
            "MultiheadAttention: the nested sequences of query and key have different lengths and a mask is given; "
            f"expected {expected_form}"
        )
    real = length_mask(queries, keys, q.shape[-2], k.shape[-2])
    out, second = layer(q, k, v, mask=real if mask is None else real & mask, is_causal=is_causal, **arguments)
    if not query.is_nested:
        return out, second
    rows = [row[:end] for row, end in zip(out, queries.tolist(), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=query.layout), second


def _padded(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x padded (B, L, E), and the length of each sequence (B,)."""
    padded = to_padded(x) if x.is_nested else None
    if not x.is_nested and x.dim() == 3:
        padded = x, torch.full((len(x),), x.shape[1], device=x.device)
    if padded is None or padded[0].dim() != 3:
        form = "expected sequences of vectors beside nested ones"
        raise ValueError(f"MultiheadAttention: {name} has another form; {form}")
    return padded
