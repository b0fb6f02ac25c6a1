"""Statistics of heads, computed from records, in memory linear in length.

The weights that a record's `top` leaves out are unknown. A share of attention is therefore an interval: the listed
weights are its lower bound, and the listed plus all missing weights its upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.watch.recording.record import Record


class Share(NamedTuple):
    """Lower and upper bound of a share of attention."""

    least: Tensor
    most: Tensor


class Heads(NamedTuple):
    """Statistics of each head of a record, averaged over the queries that attend to at least one key; all (B, H).

    `distance` is the mean over the listed weights. The shares (`first` to `induction`) are lower bounds; adding
    `unknown` gives the upper bounds. `first` is exact where `received` was recorded.
    """

    entropy: Tensor  # mean entropy, in nats; NaN where it was not recorded
    distance: Tensor  # mean distance between a query and the keys it attends to, in tokens
    first: Tensor  # share of the first key, which often is a sink
    previous: Tensor  # share of the previous token
    itself: Tensor  # share of the query's own token
    same: Tensor  # share of earlier copies of the query's token, over queries that have one
    induction: Tensor  # share of the tokens after earlier copies of the query's token, over queries that have one
    unknown: Tensor  # mean weight that is not listed


def heads(record: Record, tokens: Sequence[Any] | Tensor | None = None) -> Heads:
    """Compute statistics of each head of a record.

    Args:
        record: the record. For cross-attention, only `entropy`, `first` and `unknown` are defined; the others are NaN.
        tokens: the token of each key: a sequence (S,), or a tensor of ids (S,) or (B, S). Without it, `same` and
            `induction` are NaN.

    Source: "In-context Learning and Induction Heads", Olsson et al. (2022), for previous token and induction;
    "Efficient Streaming Language Models with Attention Sinks", Xiao et al. (2023), for the first key.

    >>> model = nn.MultiheadAttention(16, 4, batch_first=True)
    >>> with regard.watch(model, top=3) as recording:
    ...     _, weights = model(x := torch.randn(1, 3, 16), x, x, average_attn_weights=False)
    >>> expected = weights.diagonal(dim1=-2, dim2=-1).mean(-1)  # the mean weight of the query's own token
    >>> bool(torch.allclose(heads(recording[0]).itself, expected))
    True
    """
    weights, keys, listed, counted = _lists(record)
    rows = counted.sum(-1).clamp(min=1)
    undefined = torch.full(weights.shape[:2], torch.nan, dtype=weights.dtype, device=weights.device)

    def mean(x: Tensor) -> Tensor:  # (B, H, L) -> (B, H)
        return (x * counted).sum(-1) / rows

    first = share(record, torch.arange(record.keys, device=keys.device) == 0).least
    entropy = undefined if record.entropy is None else mean(record.entropy)
    if record.kind == "cross":
        return Heads(entropy, undefined, first, undefined, undefined, undefined, undefined, mean(record.missing))
    own = _query_positions(record, keys.device)[:, None]
    distance = (weights * (keys - own).abs()).sum(-1)
    total = (weights.sum(-1) * counted).sum(-1)
    same = induction = undefined
    if tokens is not None:
        same, induction = _copy_shares(record, _token_ids(tokens, record), weights, keys, listed, counted)
    return Heads(
        entropy,
        (distance * counted).sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny),
        first,
        mean((weights * (keys == own - 1) * listed).sum(-1)),
        mean((weights * (keys == own)).sum(-1)),
        same,
        induction,
        mean(record.missing),
    )


def share(record: Record, keys: Tensor, queries: Tensor | None = None) -> Share:
    """Compute the share of attention (B, H) that selected keys receive: the first token, punctuation, a segment.

    Args:
        keys: bool (S,) or (B, S).
        queries: bool (L,) or (B, L), the queries to average over; all by default, which is exact if `received` was
            recorded.

    Raises:
        ValueError: `keys` or `queries` is not a bool tensor of these shapes.

    >>> model = nn.MultiheadAttention(16, 1, batch_first=True)
    >>> with regard.watch(model, top=1) as recording:
    ...     _, weights = model(x := torch.randn(1, 3, 16), x, x)
    >>> keys = torch.tensor([True, False, True])
    >>> bool(torch.allclose(share(recording[0], keys).least, weights[..., keys].sum(-1).mean()))
    True
    """
    keys = _as_batch("keys", keys, record, record.keys)
    weights, listed_keys, listed, counted = _lists(record)
    if queries is None and record.received is not None:
        exact = (record.received * keys[:, None]).sum(-1) / counted.sum(-1).clamp(min=1)
        return Share(exact, exact)
    if queries is not None:
        counted = counted & _as_batch("queries", queries, record, record.queries)[:, None]
    selected = _gather(keys, listed_keys) & listed
    rows = counted.sum(-1).clamp(min=1)
    least = ((weights * selected).sum(-1) * counted).sum(-1) / rows
    return Share(least, least + (record.missing * counted).sum(-1) / rows)


def similarity(a: Record, b: Record | None = None) -> Share:
    """Compute the similarity of heads, from 0 to 1: the mean over the queries i of sum_j min(p_ij, p'_ij), (B, H, H').

    This is 1 minus the total variation distance. The bounds use that the weight of a key that is not listed is at most
    the smallest listed weight.

    Args:
        a, b: records of equal batch size, number of queries and number of keys; b defaults to a, which compares the
            heads of one layer with each other.

    >>> model = nn.MultiheadAttention(16, 2, batch_first=True)
    >>> with regard.watch(model, top=3) as recording:
    ...     _, weights = model(x := torch.randn(1, 3, 16), x, x, average_attn_weights=False)
    >>> expected = torch.minimum(weights[:, 0], weights[:, 1]).sum(-1).mean(-1)
    >>> bool(torch.allclose(similarity(recording[0]).least[:, 0, 1], expected))
    True
    """
    b = a if b is None else b
    if (a.max.shape[0], a.queries, a.keys) != (b.max.shape[0], b.queries, b.keys):
        sizes = [f"B = {x.max.shape[0]}, L = {x.queries}, S = {x.keys}" for x in (a, b)]
        raise ValueError(f"b: a record of {sizes[1]}; expected {sizes[0]} as in a: the same text, cut the same way")
    pairs = [_overlap(a, b, head) for head in range(a.heads)]
    return Share(*(torch.stack(parts, 1) for parts in zip(*pairs, strict=True)))


def _overlap(a: Record, b: Record, head: int) -> tuple[Tensor, Tensor]:
    """Bound the similarity of one head of a to each head of b, (B, H')."""
    (wa, ka, _, counted_a), (wb, kb, _, counted_b) = _lists(a), _lists(b)
    wa, ka, missing = wa[:, head, None], ka[:, head, None], a.missing[:, head, None]
    ceiling_a, ceiling_b = _unlisted_ceiling(wa, missing), _unlisted_ceiling(wb, b.missing)
    least, found_b = torch.zeros_like(b.max), torch.zeros_like(kb, dtype=torch.bool)
    found_a = found_b.new_zeros(*kb.shape[:-1], ka.shape[-1])
    for n in range(ka.shape[-1]):  # one listed key at a time, in the memory of a record
        match = (kb == ka[..., n, None]) & (kb >= 0)
        least += torch.where(match, torch.minimum(wb, wa[..., n, None]), 0.0).sum(-1)
        found_a[..., n] = match.any(-1)
        found_b |= match
    only_a = torch.where(found_a, 0.0, torch.minimum(wa, ceiling_b[..., None])).sum(-1).minimum(b.missing)
    only_b = torch.where(found_b, 0.0, torch.minimum(wb, ceiling_a[..., None])).sum(-1).minimum(missing)
    most = (least + only_a + only_b + torch.minimum(missing, b.missing)).clamp(max=1)
    counted = counted_a[:, head, None] & counted_b
    rows = counted.sum(-1).clamp(min=1)
    return (least * counted).sum(-1) / rows, (most * counted).sum(-1) / rows


def _unlisted_ceiling(weights: Tensor, missing: Tensor) -> Tensor:
    """Return an upper bound of the weight of each key that is not listed (B, H, L)."""
    return torch.minimum(weights[..., -1], missing)


def _lists(record: Record) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weights, keys, which entries are used (all (B, H, L, k)), and which queries attend to a key (B, H, L)."""
    keys = record.top.keys
    listed = keys >= 0
    return record.top.weights * listed, keys, listed, record.max > 0


def _query_positions(record: Record, device: torch.device) -> Tensor:
    """Return the key position of each query (L,), with the last query at the last key."""
    return torch.arange(record.queries, device=device) + record.keys - record.queries


def _gather(x: Tensor, keys: Tensor) -> Tensor:
    """Return x (B, S) at keys (B, H, L, k)."""
    x = x.expand(keys.shape[0], -1)
    return x.gather(1, keys.clamp(min=0).flatten(1)).view(keys.shape)


def _as_batch(name: str, x: Tensor, record: Record, size: int) -> Tensor:
    """Check a bool tensor (size,) or (B, size), and return it as (B, size)."""
    B = record.max.shape[0]
    if not isinstance(x, Tensor) or x.dtype != torch.bool or tuple(x.shape) not in ((size,), (B, size)):
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: {got}; expected bool of shape ({size},) or ({B}, {size})")
    x = x.to(record.max.device)
    return x if x.dim() == 2 else x[None].expand(B, -1)


def _token_ids(tokens: Sequence[Any] | Tensor, record: Record) -> Tensor:
    """Return an id of each token (B, S): equal tokens have equal ids."""
    if not isinstance(tokens, Tensor):
        ids = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
        tokens = torch.tensor([ids[token] for token in tokens])
    B = record.max.shape[0]
    if tuple(tokens.shape) not in ((record.keys,), (B, record.keys)):
        raise ValueError(
            f"tokens: shape {tuple(tokens.shape)}; expected ({record.keys},) or ({B}, {record.keys}), one token per key"
        )
    tokens = tokens.to(record.max.device)
    return tokens if tokens.dim() == 2 else tokens[None].expand(B, -1)


def _copy_shares(
    record: Record, ids: Tensor, weights: Tensor, keys: Tensor, listed: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the shares of earlier copies of the query's token and of the tokens after them, over queries with copies."""
    own = _query_positions(record, keys.device)
    query_ids = ids[:, own][:, None, :, None]
    is_copy = (_gather(ids, keys) == query_ids) & (keys < own[:, None]) & listed
    follows_copy = (_gather(ids, keys - 1) == query_ids) & (keys > 0) & (keys <= own[:, None]) & listed
    # A token has an earlier copy unless it is the first in a stable sort of equal ids: O(S log S), not all pairs.
    order = ids.sort(dim=1, stable=True)
    is_repeated = torch.zeros_like(ids, dtype=torch.bool)
    is_repeated[:, 1:] = order.values[:, 1:] == order.values[:, :-1]
    has_copy = torch.zeros_like(is_repeated).scatter(1, order.indices, is_repeated)[:, None, own] & counted
    rows = has_copy.sum(-1)
    shares = [((weights * selected).sum(-1) * has_copy).sum(-1) / rows for selected in (is_copy, follows_copy)]
    return shares[0], shares[1]  # NaN where no query has an earlier copy
