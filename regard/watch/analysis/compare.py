"""Comparison of two recordings: two models on one text, or one model on two texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from regard.watch.analysis.heads import Heads, Share, heads, similarity
from regard.watch.recording.record import Record


class Comparison(NamedTuple):
    """Two records compared.

    same: `similarity` of the heads with the same index (B, H); None if the records differ in shape or number of heads.
    alike: for each head of a, the most similar head of b (B, H); None if the records differ in shape.
    change: the statistics of b's heads minus those of a's (see `Heads`); None if the numbers of heads differ.
    """

    a: Record
    b: Record
    same: Share | None
    alike: Tensor | None
    change: Heads | None


def compare(a: Sequence[Record], b: Sequence[Record]) -> list[Comparison]:
    """Compare two recordings record by record, in order.

    Weights are compared where both records have the same batch size, number of queries and number of keys. Statistics
    of the heads (entropy, distance, sinks) are compared where both have the same batch size and number of heads.

    Raises:
        ValueError: the recordings differ in length.

    >>> model = nn.MultiheadAttention(16, 4, batch_first=True)
    >>> with regard.watch(model, top=3) as recording:
    ...     for _ in range(2):
    ...         _ = model(x := torch.randn(1, 3, 16), x, x)
    >>> (itself,) = compare(recording[:1], recording[:1])
    >>> [round(share, 4) for share in itself.same.least[0].tolist()]
    [1.0, 1.0, 1.0, 1.0]
    """
    if len(a) != len(b):
        raise ValueError(f"b: {len(b)} records; expected {len(a)} as in a: the same layers of both")
    return [_compare(record, other) for record, other in zip(a, b, strict=True)]


def _compare(a: Record, b: Record) -> Comparison:
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
    """Return the heads that differ most, as (index of the record, head, upper bound of the similarity), ascending.

    >>> a, b = nn.MultiheadAttention(16, 4, batch_first=True), nn.MultiheadAttention(16, 4, batch_first=True)
    >>> recordings = []
    >>> for model in (a, b):
    ...     with regard.watch(model, top=3) as recording:
    ...         _ = model(x := torch.ones(1, 3, 16).cumsum(1), x, x)
    ...     recordings.append(recording)
    >>> comparisons = compare(*recordings)
    >>> [(n, head, value)] = differing(comparisons, 1)
    >>> n, head == int(comparisons[0].same.most.argmin()), round(value - float(comparisons[0].same.most.min()), 6)
    (0, True, 0.0)
    """
    similarities = [
        (n, head, float(most))
        for n, comparison in enumerate(compared)
        if comparison.same is not None
        for head, most in enumerate(comparison.same.most.mean(0).tolist())
    ]
    return sorted(similarities, key=lambda entry: entry[2])[:count]
