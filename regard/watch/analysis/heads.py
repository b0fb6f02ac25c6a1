"""What heads do, told from records, in memory linear in length.

What a record's `top` leaves out is unknown: a share of it lies between what is listed and that and all that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.watch.recording.record import Record


class Share(NamedTuple):
    """A share of attention, as far as it is known: at least and at most."""

    least: Tensor
    most: Tensor


class Heads(NamedTuple):
    """What each head of a record does, over all queries that attend to anything; all (B, H).

    `distance` is over the weight that is listed. The shares (`first` to `induction`) are at least so much, and
    at most that and `unknown`; `first` is exact where `received` was recorded.
    """

    entropy: Tensor  # the mean over the queries, in nats; NaN where it was not recorded
    distance: Tensor  # how many tokens lie between a query and what it looks at
    first: Tensor  # the share of the first key: a sink, mostly
    previous: Tensor  # of the token before
    itself: Tensor
    same: Tensor  # of earlier copies of the query's token, over queries that have one
    induction: Tensor  # of what followed an earlier copy of the query's token, over queries that have one
    unknown: Tensor  # the mean weight that is not listed


def heads(record: Record, tokens: Sequence[Any] | Tensor | None = None) -> Heads:
    """What each head of a record does.

    Args:
        record: of self-attention, for all but `entropy` and `first`, which are all that cross attention has.
        tokens: what stands at each key: tokens (S,), or ids (S,) or (B, S). Without them, `same` and `induction` are NaN.

    Source of the scores: "In-context Learning and Induction Heads", Olsson et al. (2022), for previous token and induction;
    "Efficient Streaming Language Models with Attention Sinks", Xiao et al. (2023), for the first.
    """
    weights, keys, listed, counted = _lists(record)
    rows = counted.sum(-1).clamp(min=1)
    nothing = torch.full(weights.shape[:2], torch.nan, dtype=weights.dtype, device=weights.device)

    def mean(x: Tensor) -> Tensor:  # (B, H, L) -> (B, H)
        return (x * counted).sum(-1) / rows

    first = share(record, torch.arange(record.keys, device=keys.device) == 0).least
    entropy = nothing if record.entropy is None else mean(record.entropy)
    if record.kind == "cross":
        return Heads(entropy, nothing, first, nothing, nothing, nothing, nothing, mean(record.missing))
    own = _own(record, keys.device)[:, None]
    distance = (weights * (keys - own).abs()).sum(-1)
    total = (weights.sum(-1) * counted).sum(-1)
    same = induction = nothing
    if tokens is not None:
        same, induction = _copies(record, _numbers(tokens, record), weights, keys, listed, counted)
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
    """The share of attention that chosen keys get, (B, H): the first token, punctuation, a segment.

    Args:
        keys: bool (S,) or (B, S).
        queries: bool (L,) or (B, L): over these alone. Without them, and with `received` recorded, it is exact.

    Raises:
        ValueError: `keys` or `queries` has another shape.
    """
    keys = _chosen("keys", keys, record, record.keys)
    weights, at, listed, counted = _lists(record)
    if queries is None and record.received is not None:
        exact = (record.received * keys[:, None]).sum(-1) / counted.sum(-1).clamp(min=1)
        return Share(exact, exact)
    if queries is not None:
        counted = counted & _chosen("queries", queries, record, record.queries)[:, None]
    hit = _at(keys, at) & listed
    rows = counted.sum(-1).clamp(min=1)
    least = ((weights * hit).sum(-1) * counted).sum(-1) / rows
    return Share(least, least + (record.missing * counted).sum(-1) / rows)


def similarity(a: Record, b: Record | None = None) -> Share:
    """How alike heads attend: sum_j min(p_ij, p'_ij), the mean over the queries, from 0 to 1; (B, H, H').

    That is 1 less the total variation distance. It is known as far as the lists tell: a key that one of them leaves out has
    at most the least weight that it lists.

    Args:
        a, b: records of as many queries and keys; b is a by default: each head beside each other one of its layer.
    """
    b = a if b is None else b
    if (a.max.shape[0], a.queries, a.keys) != (b.max.shape[0], b.queries, b.keys):
        sizes = [f"B = {x.max.shape[0]}, L = {x.queries}, S = {x.keys}" for x in (a, b)]
        raise ValueError(f"b: a record of {sizes[1]}; expected {sizes[0]} as in a: the same text, cut the same way")
    pairs = [_overlap(a, b, head) for head in range(a.heads)]
    return Share(*(torch.stack(parts, 1) for parts in zip(*pairs, strict=True)))


def _overlap(a: Record, b: Record, head: int) -> tuple[Tensor, Tensor]:
    """Of one head of a with all of b: (B, H')."""
    (wa, ka, _, counted_a), (wb, kb, _, counted_b) = _lists(a), _lists(b)
    wa, ka, missing = wa[:, head, None], ka[:, head, None], a.missing[:, head, None]
    floor_a, floor_b = _floor(wa, missing), _floor(wb, b.missing)
    least, found_b = torch.zeros_like(b.max), torch.zeros_like(kb, dtype=torch.bool)
    found_a = found_b.new_zeros(*kb.shape[:-1], ka.shape[-1])
    for n in range(ka.shape[-1]):  # one listed key at a time: memory stays that of a record
        match = (kb == ka[..., n, None]) & (kb >= 0)
        least += torch.where(match, torch.minimum(wb, wa[..., n, None]), 0.0).sum(-1)
        found_a[..., n] = match.any(-1)
        found_b |= match
    only_a = torch.where(found_a, 0.0, torch.minimum(wa, floor_b[..., None])).sum(-1).minimum(b.missing)
    only_b = torch.where(found_b, 0.0, torch.minimum(wb, floor_a[..., None])).sum(-1).minimum(missing)
    most = (least + only_a + only_b + torch.minimum(missing, b.missing)).clamp(max=1)
    counted = counted_a[:, head, None] & counted_b
    rows = counted.sum(-1).clamp(min=1)
    return (least * counted).sum(-1) / rows, (most * counted).sum(-1) / rows


def _floor(weights: Tensor, missing: Tensor) -> Tensor:
    """The most that a key can have which is not listed (B, H, L)."""
    return torch.minimum(weights[..., -1], missing)


def _lists(record: Record) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and keys (B, H, L, k), which of them are listed, and which queries (B, H, L) attend to anything."""
    keys = record.top.keys
    listed = keys >= 0
    return record.top.weights * listed, keys, listed, record.max > 0


def _own(record: Record, device: torch.device) -> Tensor:
    """The key beside each query (L,): the last one beside the last."""
    return torch.arange(record.queries, device=device) + record.keys - record.queries


def _at(x: Tensor, keys: Tensor) -> Tensor:
    """Of each listed key, what x (B, S) says: (B, H, L, k)."""
    x = x.expand(keys.shape[0], -1)
    return x.gather(1, keys.clamp(min=0).flatten(1)).view(keys.shape)


def _chosen(name: str, chosen: Tensor, record: Record, size: int) -> Tensor:
    B = record.max.shape[0]
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or tuple(chosen.shape) not in ((size,), (B, size)):
        got = f"{chosen.dtype} {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise ValueError(f"{name}: {got}; expected bool of shape ({size},) or ({B}, {size})")
    chosen = chosen.to(record.max.device)
    return chosen if chosen.dim() == 2 else chosen[None].expand(B, -1)


def _numbers(tokens: Sequence[Any] | Tensor, record: Record) -> Tensor:
    """A number for each token (B, S), equal where they are equal."""
    if not isinstance(tokens, Tensor):
        names = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
        tokens = torch.tensor([names[token] for token in tokens])
    B = record.max.shape[0]
    if tuple(tokens.shape) not in ((record.keys,), (B, record.keys)):
        raise ValueError(
            f"tokens: of shape {tuple(tokens.shape)}; expected ({record.keys},) or ({B}, {record.keys}), one for each key"
        )
    tokens = tokens.to(record.max.device)
    return tokens if tokens.dim() == 2 else tokens[None].expand(B, -1)


def _copies(
    record: Record, ids: Tensor, weights: Tensor, keys: Tensor, listed: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """The shares of earlier copies of each query's token, and of what followed them, over queries that have any."""
    own = _own(record, keys.device)
    mine = ids[:, own][:, None, :, None]
    earlier = keys < own[:, None]
    same = (_at(ids, keys) == mine) & earlier & listed
    follows = (_at(ids, keys - 1) == mine) & (keys > 0) & (keys <= own[:, None]) & listed
    # A token has an earlier copy where it is not the first of its kind: told by sorting, not by all pairs.
    order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = order.values[:, 1:] == order.values[:, :-1]
    has = torch.zeros_like(again).scatter(1, order.indices, again)[:, None, own] & counted
    rows = has.sum(-1)
    shares = [((weights * hit).sum(-1) * has).sum(-1) / rows for hit in (same, follows)]
    return shares[0], shares[1]  # NaN where no query has an earlier copy
