"""Records of attention that never was, for the tests of the views."""

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


def seen(
    weights: Tensor, layer: int = 0, *, k: int | None = None, kind: str = "self", causal: bool = False,
    name: str = "decoder.{layer}.{kind}",
) -> Record:  # fmt: skip
    """A record of dense weights (B, H, L, S), keeping the k largest."""
    _, heads, queries, keys = weights.shape
    top = weights.topk(min(k or keys, keys), -1)
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
    at = top.indices.masked_fill(top.values == 0, -1) if causal else top.indices
    received, most = weights.sum(-2), weights.amax(-1)
    path = name.format(layer=layer, kind=kind)
    found = Top(top.values, at)
    kind = "decoder" if causal else kind
    return Record(path, layer, 0, kind, heads, queries, keys, found, most, received, entropy, None)


def random(
    batch: int, heads: int, queries: int, keys: int, *, seed: int = 0, causal: bool = False, sharp: float = 2.0
) -> Tensor:
    """Random weights (batch, heads, queries, keys)."""
    scores = sharp * torch.randn(batch, heads, queries, keys, generator=torch.Generator().manual_seed(seed))
    if causal:
        scores = scores.masked_fill(torch.ones(queries, keys).triu(keys - queries + 1).bool(), -torch.inf)
    return scores.softmax(-1)


def dense(record: Record) -> Tensor:
    """The weights of a record that keeps them all."""
    weights = torch.zeros(*record.top.weights.shape[:3], record.keys)
    keys = record.top.keys
    return weights.scatter_add(-1, keys.clamp(min=0), record.top.weights * (keys >= 0))


def long(size: int, layers: int, heads: int, k: int = 8) -> list[Record]:
    """Causal records with k keys a row: the token itself, those before it, and any."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for layer in range(layers):
        own = torch.arange(size)[None, :, None]
        any_ = (torch.rand(heads, size, k - 2, generator=generator) * (own + 1)).long()
        keys = torch.cat([own.expand(heads, size, 1), (own - 1).clamp(min=0).expand(heads, size, 1), any_], -1)
        keys = keys.sort(-1).values
        twice = torch.zeros_like(keys, dtype=torch.bool)
        twice[..., 1:] = keys[..., 1:] == keys[..., :-1]
        weights = (torch.rand(heads, size, k, generator=generator) + 0.01).masked_fill(twice, 0.0)
        weights = 0.8 * weights / weights.sum(-1, keepdim=True)
        weights, order = weights.sort(-1, descending=True)
        keys = keys.masked_fill(twice, -1).gather(-1, order)
        received = torch.zeros(heads, size).scatter_add_(1, keys.clamp(min=0).flatten(1), weights.flatten(1))
        entropy = torch.rand(1, heads, size, generator=generator)
        top = Top(weights[None], keys[None])
        name = f"layers.{layer}"
        records.append(
            Record(
                name, layer, 0, "decoder", heads, size, size, top, top.weights[..., 0], received[None], entropy, None
            )
        )
    return records


def tokens(size: int) -> list[str]:
    return [WORDS[n % len(WORDS)] if n % 97 else f"rare{n}" for n in range(size)]
