"""Records of attention that never was, for the tests of the views."""

from __future__ import annotations

import torch
from torch import Tensor

from regard import Top
from regard.watch import Record


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
