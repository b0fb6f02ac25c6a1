"""Masks: which queries may attend to which keys. True means that a query may attend to a key.

A mask is a predicate on (batch, head, query, key). Masks combine with `&` (and), `|` (or) and `~` (not):

    mask.causal(align="end") & mask.window(left=255, right=0) | mask.prefix(16)

A mask is never materialized as a matrix (L, S). Backends ask which tiles of the matrix are empty, partial or full
(`coverage`), and evaluate the predicate in partial tiles only (`allowed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard import check
from regard.components.predicate import (
    AlignedBand,
    And,
    Band,
    Before,
    Blocks,
    Dense,
    Documents,
    Mask,
    Not,
    Or,
    Where,
)  # fmt: skip
from regard.components.tile import Align

__all__ = [
    "AlignedBand",
    "And",
    "Band",
    "Before",
    "Blocks",
    "Dense",
    "Documents",
    "Mask",
    "Not",
    "Or",
    "Where",
    "blocks",
    "causal",
    "dense",
    "documents",
    "lengths",
    "packed",
    "prefix",
    "where",
    "window",
]


def causal(align: Align | Tensor | Mask = None) -> Mask:
    """Allow each query its own position and the positions before it.

    Args:
        align: the position of the queries relative to the keys, required if L != S. "start" aligns query 0 with key 0,
            as `is_causal=True` of `scaled_dot_product_attention` does. "end" aligns the last query with the last key,
            as in decoding with a key/value cache and in FlashAttention. An int n aligns query 0 with key n.

            To align each batch row or document by itself: an integer tensor (B,) with the key position of query 0, or
            (B, L) with that of each query; or a mask of `lengths` or `documents`, whose last key in each row or document
            is aligned with the last query, as in FlashAttention with sequences of different lengths.

    >>> q, k, v = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 1)
    >>> regard.attention(q, k, v, mask=mask.causal("start"), summary=Summary(full=True))[1].full
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000]])
    >>> regard.attention(q, k, v, mask=mask.causal("end"), summary=Summary(full=True))[1].full
    tensor([[0.5000, 0.5000, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    """
    return _band("causal", None, 0, align)


def window(left: int | None = None, right: int | None = None, align: Align | Tensor | Mask = None) -> Mask:
    """Allow each query its own position, `left` positions before it and `right` positions after it.

    The position of the query itself is not counted: `window(left=255, right=0)` covers 256 keys, like a sliding window
    of 256 in Hugging Face Transformers and `window_size=(255, 0)` in FlashAttention.

    Args:
        left, right: numbers of keys; None for no limit on this side.
        align: as in `causal`, also a tensor (B,) or (B, L); if omitted, the one of the other masks of the same
            expression.

    Source: Beltagy, Peters, Cohan, "Longformer" (2020), section 3.1.

    >>> x = torch.zeros(4, 1)
    >>> regard.attention(x, x, x, mask=mask.window(left=1, right=0), summary=Summary(full=True))[1].full
    tensor([[1.0000, 0.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 0.5000, 0.5000]])
    """
    for name, value in (("left", left), ("right", right)):
        if value is not None:
            check.integer(f"window: {name}", value, 0, ", or None for no limit")
    return _band("window", left, right, align)


def _band(name: str, left: int | None, right: int | None, align: Align | Tensor | Mask) -> Mask:
    """Return the band of `causal` or `window` for its alignment."""
    if isinstance(align, Before):
        return AlignedBand(left, right, align.n.reshape(-1, 1), from_end=True)
    if isinstance(align, Documents):
        return AlignedBand(left, right, _align_documents(align))
    if isinstance(align, Tensor) and check.is_integer_tensor(align) and align.dim() in (1, 2):
        return AlignedBand(left, right, align[:, None] if align.dim() == 1 else align)
    if isinstance(align, Tensor | Mask):
        expected = '"start", "end", an int, an integer tensor (B,) or (B, L), or one mask of lengths or documents'
        raise check.error(
            f"{name}: align", align, expected, isinstance(align, Tensor) and check.is_integer_tensor(align)
        )
    return Band(left, right, check.align(align))


def _align_documents(of: Documents) -> Tensor:
    """Return the key position of each query (B|1, L), with the last query of each document at its last key.

    A query whose document has no keys gets the position -1.
    """
    queries, keys = of.queries, of.keys
    batch = max(queries.shape[0], keys.shape[0])
    queries, keys = queries.expand(batch, -1), keys.expand(batch, -1)
    after_q, last_k = _count_after(queries), _last_positions(queries, keys)
    return torch.where(last_k < 0, -1, last_k - after_q)


def _count_after(ids: Tensor) -> Tensor:
    """Return how many positions of the same document come after each position, (B, L)."""
    order = ids.argsort(dim=1, stable=True)
    ends = _run_ends(ids.gather(1, order))
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return torch.empty_like(order).scatter(1, order, ends - index)


def _run_ends(ids: Tensor) -> Tensor:
    """Return the index of the last element of the run of equal ids that each element lies in; ids (B, L) are sorted."""
    length = ids.shape[1]
    index = torch.arange(length, device=ids.device).expand_as(ids)
    is_last = torch.ones_like(ids, dtype=torch.bool)
    is_last[:, :-1] = ids[:, 1:] != ids[:, :-1]
    return torch.where(is_last, index, length).flip(1).cummin(1).values.flip(1)


def _last_positions(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the position of the last key of the document of each query (B, L); -1 where it has none."""
    if not keys.shape[1]:
        return torch.full_like(queries, -1)
    order = keys.argsort(dim=1, stable=True)
    ids = keys.gather(1, order)
    at = torch.searchsorted(ids.contiguous(), queries.contiguous(), right=True) - 1
    found = ids.gather(1, at.clamp(min=0)) == queries
    return torch.where((at >= 0) & found, order.gather(1, at.clamp(min=0)), -1)


def packed(queries: Tensor, keys: Tensor | None = None) -> Mask:
    """Allow each query the keys of its own sequence, for sequences that are concatenated without padding.

    Args:
        queries: offsets of the sequences, an integer tensor (N + 1,): 0, then the cumulative lengths, as `cu_seqlens` in
            FlashAttention.
        keys: those of the keys; by default the same.

    >>> offsets = torch.tensor([0, 2, 3])
    >>> x = torch.zeros(3, 4)
    >>> regard.attention(x, x, x, mask=mask.packed(offsets) & mask.causal(), summary=Summary(full=True))[1].full
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """
    ids = []
    for name, offsets in (("queries", queries), ("keys", queries if keys is None else keys)):
        fits = check.is_integer_tensor(offsets)
        if not fits or offsets.dim() != 1 or not len(offsets):
            raise check.error(f"packed: {name}", offsets, "offsets of N sequences, an integer tensor (N + 1,)", fits)
        if int(offsets[0]) or bool((offsets.diff() < 0).any()):
            raise ValueError(f"packed: {name} is {offsets.tolist()}; expected 0, then cumulative lengths")
        ids.append(torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())[None])
    if len(queries) != len(queries if keys is None else keys):
        raise ValueError(
            f"packed: keys has {0 if keys is None else len(keys)} offsets but queries has {len(queries)}; expected as many"
        )
    return Documents(ids[0], ids[1])


def lengths(n: Tensor) -> Mask:
    """Allow the first n[b] keys of batch row b; the others are padding.

    Args:
        n: integer tensor (B,), or a list of ints. Values above S allow all keys, values below 1 none.

    >>> x = torch.zeros(2, 1, 3, 4)
    >>> regard.attention(x, x, x, mask=mask.lengths([3, 2]), summary=Summary(received=True))[1].received.squeeze()
    tensor([[1.0000, 1.0000, 1.0000],
            [1.5000, 1.5000, 0.0000]])
    """
    if isinstance(n, list | tuple) and all(check.is_int(part) for part in n):
        n = torch.tensor(n, dtype=torch.int64)
    if not check.is_integer_tensor(n) or n.dim() != 1:
        raise check.error(
            "lengths: n", n, "an integer tensor of shape (B,), or a list of ints", check.is_integer_tensor(n)
        )
    return Before(n)


def prefix(n: int | Tensor) -> Mask:
    """Allow every query the first n keys.

    For a prefix language model, combine it with a causal mask: `causal() | prefix(n)`.

    Args:
        n: an int, or an integer tensor (B,).

    Source: Raffel et al., "T5" (2020), figure 4.

    >>> x = torch.zeros(3, 4)
    >>> regard.attention(x, x, x, mask=mask.causal() | mask.prefix(2), summary=Summary(full=True))[1].full
    tensor([[0.5000, 0.5000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    """
    if check.is_int(n) and n >= 0:
        n = torch.tensor(n)
    if not check.is_integer_tensor(n) or n.dim() > 1:
        raise check.error(
            "prefix: n",
            n,
            "an integer >= 0, or an integer tensor of shape (B,)",
            check.is_int(n) or check.is_integer_tensor(n),
        )
    return Before(n)


def documents(ids: Tensor | tuple[Tensor, Tensor]) -> Mask:
    """Allow each query the keys of its own document, for several documents packed into one sequence.

    Args:
        ids: document id of each position, an integer tensor (B, S) or (S,) for both queries and keys, or a pair of
            tensors (queries (B, L), keys (B, S)). Ids are arbitrary; if they are sorted, more tiles can be skipped.

    >>> x = torch.zeros(3, 4)
    >>> regard.attention(x, x, x, mask=mask.documents(torch.tensor([0, 0, 1])), summary=Summary(full=True))[1].full
    tensor([[0.5000, 0.5000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """
    pair = ids if isinstance(ids, tuple) else (ids, ids)
    if len(pair) != 2:
        raise ValueError(f"documents: ids is a tuple of {len(pair)}; expected a tensor, or a pair (queries, keys)")
    for part in pair:
        if not check.is_integer_tensor(part) or part.dim() not in (1, 2):
            raise check.error(
                "documents: ids", part, "an integer tensor of shape (B, S) or (S,)", check.is_integer_tensor(part)
            )
    queries, keys = (part if part.dim() == 2 else part[None] for part in pair)
    return Documents(queries, keys)


def blocks(table: Tensor, size: int | tuple[int, int] | None = None) -> Mask:
    """Allow pairs by blocks of queries and keys (block-sparse attention).

    Args:
        table: bool tensor (R, C), (H, R, C) or (B, H, R, C): whether a block of queries may attend to a block of keys. For
            q (B, L, D), without heads, (B, R, C).
        size: number of queries and keys per block, an int or a pair. The last block may be shorter, so that
            R = ceil(L / size) and C = ceil(S / size). By default the dimensions are divided evenly.

    >>> x = torch.zeros(4, 1)
    >>> table = torch.tensor([[True, False], [True, True]])
    >>> regard.attention(x, x, x, mask=mask.blocks(table, size=2), summary=Summary(full=True))[1].full
    tensor([[0.5000, 0.5000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000, 0.0000],
            [0.2500, 0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if not check.is_bool_tensor(table) or table.dim() not in (2, 3, 4) or not table.numel():
        expected = "a nonempty bool tensor of shape (R, C), (H, R, C) or (B, H, R, C)"
        raise check.error("blocks: table", table, expected, check.is_bool_tensor(table))
    rows, columns = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
    for part in (rows, columns):
        if part is not None and (not check.is_int(part) or part <= 0):
            raise check.error("blocks: size", size, "an integer > 0, or a tuple of two", isinstance(size, int | tuple))
    return Blocks(table[(None,) * (4 - table.dim())], rows, columns)


def dense(table: Tensor) -> Mask:
    """Wrap a bool tensor that broadcasts to (B, H, L, S); True means that a query may attend to a key. For q (B, L, D),
    without heads, it broadcasts to (B, L, S).

    The tensor is not copied or expanded. A float mask that is added to the scores is passed as `bias` instead.

    >>> x = torch.zeros(2, 1)
    >>> table = torch.tensor([[True, True], [False, True]])
    >>> regard.attention(x, x, x, mask=mask.dense(table), summary=Summary(full=True))[1].full
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    if not check.is_bool_tensor(table) or table.dim() > 4:
        expected = "a bool tensor that broadcasts to (B, H, L, S), True = may attend"
        if check.is_float_tensor(table):
            expected += " (a float mask that is added to the scores goes into bias=)"
        raise check.error("dense: table", table, expected, check.is_bool_tensor(table))
    return Dense(table[(None,) * (4 - table.dim())])


def where(predicate: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> Mask:
    """Wrap a Python function `predicate(batch, head, query, key)` of four index tensors that returns a bool tensor.

    The index tensors broadcast to the shape of a tile. `mask_mod` functions of FlexAttention work unchanged.

    >>> x = torch.zeros(3, 1)
    >>> is_same_parity = mask.where(lambda batch, head, query, key: (query - key) % 2 == 0)
    >>> regard.attention(x, x, x, mask=is_same_parity, summary=Summary(full=True))[1].full
    tensor([[0.5000, 0.0000, 0.5000],
            [0.0000, 1.0000, 0.0000],
            [0.5000, 0.0000, 0.5000]])
    """
    if not callable(predicate):
        raise check.error("where: predicate", predicate, "a function (batch, head, query, key) -> bool tensor", False)
    return Where(predicate)


# All masks by name. Tests and the documentation iterate over this table.
_MASKS: dict[str, Callable[..., Mask]] = {
    "causal": causal,
    "window": window,
    "lengths": lengths,
    "packed": packed,
    "prefix": prefix,
    "documents": documents,
    "blocks": blocks,
    "dense": dense,
    "where": where,
}
