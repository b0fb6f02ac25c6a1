"""Two models on one text, or one model on two texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from regard.watch.analysis.heads import Heads, Share, heads, similarity
from regard.watch.recording.record import Record


class Comparison(NamedTuple):
    """One attention beside another.

    `same` (B, H): how alike each head attends to its namesake, where both read the same tokens, else None (`similarity`).
    `alike` (B, H) the head of b that is most like each of a. `change`: what b's heads do more than a's, (B, H) each.
    """

    a: Record
    b: Record
    same: Share | None
    alike: Tensor | None
    change: Heads | None


def compare(a: Sequence[Record], b: Sequence[Record]) -> list[Comparison]:
    """Compare what was seen of two models or of two inputs, record by record.

    Records are paired by their order. Where both are of as many queries and keys, weights are compared; what heads do
    (entropy, distance, sinks) is compared where there are as many heads.

    Raises:
        ValueError: there are not as many records.
    """
    if len(a) != len(b):
        raise ValueError(f"b: {len(b)} records; expected {len(a)} as in a: the same layers of both")
    return [_compared(one, other) for one, other in zip(a, b, strict=True)]


def _compared(a: Record, b: Record) -> Comparison:
    same = alike = change = None
    if (a.max.shape[0], a.queries, a.keys) == (b.max.shape[0], b.queries, b.keys):
        overlaps = similarity(a, b)
        alike = overlaps.least.argmax(-1)
        if a.heads == b.heads:
            same = Share(*(x.diagonal(dim1=-2, dim2=-1) for x in overlaps))
    if a.heads == b.heads and a.max.shape[0] == b.max.shape[0]:
        change = Heads(*(y - x for x, y in zip(heads(a), heads(b), strict=True)))
    return Comparison(a, b, same, alike, change)


def differing(compared: Sequence[Comparison], count: int = 10) -> list[tuple[int, int, float]]:
    """The heads that attend most differently: (number of the record, head, how alike at most), the least alike first."""
    found = [
        (n, head, float(alike))
        for n, one in enumerate(compared)
        if one.same is not None
        for head, alike in enumerate(one.same.most.mean(0).tolist())
    ]
    return sorted(found, key=lambda entry: entry[2])[:count]
