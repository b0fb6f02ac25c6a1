"""The interface between records and views: the record of one attention call, and the texts of its queries and keys.

Axes: B batch, H heads, L queries, S keys, k recorded keys per query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TopLike(Protocol):
    """The largest weights of every row, and their keys."""

    @property
    def weights(self) -> Tensor: ...  # (B,H,L,k), in descending order, padded with 0

    @property
    def keys(self) -> Tensor: ...  # (B,H,L,k) int64, padded with -1


class RecordLike(Protocol):
    """One attention call of one module, as the views need it."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def kind(self) -> str: ...  # "self", "decoder" (causal self-attention) or "cross"
    @property
    def call(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def queries(self) -> int: ...
    @property
    def keys(self) -> int: ...
    @property
    def causal(self) -> bool: ...
    @property
    def top(self) -> TopLike: ...
    @property
    def received(self) -> Tensor | None: ...  # (B,H,S)
    @property
    def entropy(self) -> Tensor | None: ...  # (B,H,L), nats


@dataclass(frozen=True)
class Rows:
    """One batch entry of a record, on the CPU in fp32, with what follows from its top-k weights."""

    weights: Tensor  # (H,L,k)
    keys: Tensor  # (H,L,k)
    listed: Tensor  # (H,L,k) bool: the entry is a key, not padding
    allowed: Tensor  # (L,) number of keys that the causal mask permits
    complete: Tensor  # (H,L) bool: every key that may be attended is listed
    rest: Tensor  # (H,L) total weight of the keys that are not listed
    entropy: Tensor | None  # (H,L) nats; None if it was not recorded and cannot be computed from the list
    received: Tensor  # (H,S)
    received_exact: bool  # False if `received` is a lower bound, summed from the list
    offset: int  # position of the first query in its text


def rows(record: RecordLike, batch: int, heads: Sequence[int] | None = None) -> Rows:
    """Return the rows of one batch entry, of some heads or all. With a cache, the L queries are the last of the S keys.

    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> entries = rows(records[0], 0)
    >>> entries.weights.shape, bool(entries.complete.all()), entries.received.sum(-1).round(decimals=4).tolist()
    (torch.Size([2, 3, 3]), True, [3.0, 3.0])
    """
    some = slice(None) if heads is None else list(heads)
    keys = record.top.keys[batch][some].detach().cpu().long()
    listed = keys >= 0
    weights = record.top.weights[batch][some].detach().cpu().float().nan_to_num(0.0).masked_fill(~listed, 0.0)
    offset = 0 if record.kind == "cross" else record.keys - record.queries
    allowed = torch.full((record.queries,), record.keys)
    if record.causal:
        allowed = (torch.arange(record.queries) + offset + 1).clamp(0, record.keys)
    count = listed.sum(-1)
    complete = (count < keys.shape[-1]) | (count >= allowed)
    exact = record.received is not None or bool(complete.all())
    if record.received is not None:
        received = record.received[batch][some].detach().cpu().float().nan_to_num(0.0)
    else:
        received = torch.zeros(keys.shape[0], record.keys)
        received.scatter_add_(1, keys.clamp(min=0).flatten(1), weights.flatten(1))
    entropy = None
    if record.entropy is not None:
        entropy = record.entropy[batch][some].detach().cpu().float().nan_to_num(0.0)
    elif bool(complete.all()):
        entropy = -torch.special.xlogy(weights, weights).sum(-1)
    rest = (1 - weights.sum(-1)).clamp(0, 1)
    return Rows(weights, keys, listed, allowed, complete, rest, entropy, received, exact, offset)


@dataclass(frozen=True)
class Sides:
    """The texts of the queries and the keys of a record (0: `tokens`, 1: `key_tokens`, 2: `produced`), and their tokens."""

    query_text: int
    key_text: int
    queries: Sequence[str]  # L of them
    keys: Sequence[str]  # S of them


def check(
    records: Sequence[RecordLike],
    tokens: Sequence[str],
    key_tokens: Sequence[str] | None,
    batch: int,
    produced: Sequence[str] | None = None,
) -> list[Sides]:
    """Return the sides of every record.

    Raises:
        ValueError: the tokens or the batch index do not match the records; the message names the argument.

    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> check(records, ["the", "cat", "sat"], None, 0)[0].queries
    ['the', 'cat', 'sat']
    >>> check(records, ["the", "cat"], None, 0)
    Traceback (most recent call last):
    ValueError: tokens has 2 entries: expected 3, the keys of record '' (layer 0, self, L=3, S=3)
    """
    if len(records) == 0:
        raise ValueError("records is empty: expected at least one record of an attention call")
    for name, text in (("tokens", tokens), ("key_tokens", key_tokens)):
        if text is not None and len(text) == 0:
            raise ValueError(f"{name} is empty: expected at least one token")
    if produced is not None and (key_tokens is None or len(produced) != len(tokens)):
        expected = f"{len(tokens)}, as many as tokens, and key_tokens"
        raise ValueError(f"produced has {len(produced)} entries: expected {expected}")
    for record in records:
        size, k = record.top.weights.shape[0], record.top.weights.shape[-1]
        if k == 0:
            raise ValueError(f"record {record.name!r} holds no weights: expected top.weights (B,H,L,k) with k >= 1")
        if not 0 <= batch < size:
            raise ValueError(f"batch is {batch}: expected 0 <= batch < {size}, the batch of record {record.name!r}")
    return [_sides(record, tokens, key_tokens, produced) for record in records]


def _sides(
    record: RecordLike, tokens: Sequence[str], key_tokens: Sequence[str] | None, produced: Sequence[str] | None
) -> Sides:
    length, size = record.queries, record.keys
    description = f"record {record.name!r} (layer {record.layer}, {record.kind}, L={length}, S={size})"
    if record.kind == "cross":
        sources = tokens if key_tokens is None else key_tokens
        if len(tokens) != length:
            raise ValueError(f"tokens has {len(tokens)} entries: expected {length}, the queries of {description}")
        if len(sources) != size:
            name = "tokens" if key_tokens is None else "key_tokens"
            raise ValueError(f"{name} has {len(sources)} entries: expected {size}, the keys of {description}")
        if produced is not None:
            return Sides(2, 1, produced, sources)
        return Sides(0, 0 if key_tokens is None else 1, tokens, sources)
    texts = [(0, tokens)] if key_tokens is None else [(0, tokens), (1, key_tokens)]
    if key_tokens is not None and _is_of_encoder(record.name):
        texts.reverse()  # with two texts, an encoder reads the source: the keys of cross attention
    for index, text in texts:
        if len(text) == size and length <= size:
            return Sides(index, index, text[size - length :], text)
    lengths = " and ".join(f"{('tokens', 'key_tokens')[i]} has {len(t)} entries" for i, t in sorted(texts))
    raise ValueError(f"{lengths}: expected {size}, the keys of {description}")


def _is_of_encoder(name: str) -> bool:
    """Whether a module belongs to an encoder: a decoder that is a BERT has an encoder of its own, "decoder.bert.encoder"."""
    parts = name.split(".")
    return "encoder" in parts and "decoder" not in parts[: parts.index("encoder")]


def label(record: RecordLike, sides: Sides) -> str:
    """Return the name of a record in the views: "layer 3", "encoder layer 3", "cross layer 3", "layer 3, call 1".

    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> label(records[0], check(records, ["the", "cat", "sat"], None, 0)[0])
    'layer 0'
    """
    part = "cross " if record.kind == "cross" else "encoder " if sides.key_text == 1 else ""
    return f"{part}layer {record.layer}" + (f", call {record.call}" if record.call else "")
