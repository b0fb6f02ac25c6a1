"""Synthetic records for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from regard import Top
from regard.watch import Record

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "it",
    "sleeps",
    "in",
    "the",
    "sun",
    ",",
    "while",
    "birds",
    "sing",
    ".",
]


def make_record(
    weights: Tensor, layer: int = 0, *, k: int | None = None, kind: str = "self", causal: bool = False,
    name: str = "decoder.{layer}.{kind}",
) -> Record:  # fmt: skip
    """Return the record of dense weights (B, H, L, S), with the k largest of each row."""
    _, heads, queries, keys = weights.shape
    top = weights.topk(min(k or keys, keys), -1)
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
    top_keys = top.indices.masked_fill(top.values == 0, -1) if causal else top.indices
    return Record(
        name=name.format(layer=layer, kind=kind),
        layer=layer,
        call=0,
        kind="decoder" if causal else kind,
        heads=heads,
        queries=queries,
        keys=keys,
        top=Top(top.values, top_keys),
        max=weights.amax(-1),
        received=weights.sum(-2),
        entropy=entropy,
        rows=None,
    )


def random_weights(
    batch: int, heads: int, queries: int, keys: int, *, seed: int = 0, causal: bool = False, sharp: float = 2.0
) -> Tensor:
    """Return random weights (batch, heads, queries, keys)."""
    scores = sharp * torch.randn(batch, heads, queries, keys, generator=torch.Generator().manual_seed(seed))
    if causal:
        scores = scores.masked_fill(torch.ones(queries, keys).triu(keys - queries + 1).bool(), -torch.inf)
    return scores.softmax(-1)


def dense_weights(record: Record) -> Tensor:
    """Return the dense weights of a record that lists all of them."""
    weights = torch.zeros(*record.top.weights.shape[:3], record.keys)
    keys = record.top.keys
    return weights.scatter_add(-1, keys.clamp(min=0), record.top.weights * (keys >= 0))


def make_long_records(size: int, layers: int, heads: int, k: int = 8) -> list[Record]:
    """Return causal records with k keys per row: the token itself, the previous one, and random ones."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for layer in range(layers):
        own = torch.arange(size)[None, :, None]
        random_keys = (torch.rand(heads, size, k - 2, generator=generator) * (own + 1)).long()
        keys = torch.cat([own.expand(heads, size, 1), (own - 1).clamp(min=0).expand(heads, size, 1), random_keys], -1)
        keys = keys.sort(-1).values
        is_repeated = torch.zeros_like(keys, dtype=torch.bool)
        is_repeated[..., 1:] = keys[..., 1:] == keys[..., :-1]
        weights = (torch.rand(heads, size, k, generator=generator) + 0.01).masked_fill(is_repeated, 0.0)
        weights = 0.8 * weights / weights.sum(-1, keepdim=True)
        weights, order = weights.sort(-1, descending=True)
        keys = keys.masked_fill(is_repeated, -1).gather(-1, order)
        received = torch.zeros(heads, size).scatter_add_(1, keys.clamp(min=0).flatten(1), weights.flatten(1))
        entropy = torch.rand(1, heads, size, generator=generator)
        records.append(
            Record(
                name=f"layers.{layer}",
                layer=layer,
                call=0,
                kind="decoder",
                heads=heads,
                queries=size,
                keys=size,
                top=Top(weights[None], keys[None]),
                max=weights[None, ..., 0],
                received=received[None],
                entropy=entropy,
                rows=None,
            )
        )
    return records


def make_tokens(size: int) -> list[str]:
    """Return words, with a rare one every 97 tokens."""
    return [WORDS[n % len(WORDS)] if n % 97 else f"rare{n}" for n in range(size)]
