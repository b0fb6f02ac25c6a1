"""Batches of sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard import deprecated
from regard.tasks.tokens import PAD


def make_batches(lengths: Sequence[int], budget: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """Group examples of similar lengths into batches of at most `budget` tokens, padding included.

    Args:
        lengths: length of each example.
        budget: maximum number of tokens per batch; a longer example forms a batch of its own.
        generator: shuffles the examples of equal length, and the batches. Without it, batches are sorted by length.

    Returns:
        The indices of the examples in each batch.

    >>> from regard.tasks.batch import make_batches
    >>> make_batches([2, 5, 3, 9, 2], budget=8)
    [[0, 4], [2], [1], [3]]
    """
    n = len(lengths)
    order = torch.randperm(n, generator=generator).tolist() if generator is not None else list(range(n))
    order.sort(key=lambda i: lengths[i])  # stable: examples of equal length stay shuffled
    batches: list[list[int]] = []
    for i in order:
        # The examples are sorted by length, so the last of a batch is the longest.
        if not batches or (len(batches[-1]) + 1) * lengths[i] > budget:
            batches.append([])
        batches[-1].append(i)
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of integers as one tensor (B, S), padded with `PAD`, and their lengths (B,).

    >>> from regard.tasks.batch import pad
    >>> pad([[5, 6], [7]])
    (tensor([[5, 6],
            [7, 0]]), tensor([2, 1]))
    """
    lengths = torch.tensor([len(row) for row in rows])
    out = torch.full((len(rows), int(lengths.max()) if len(rows) else 0), PAD)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out, lengths


__getattr__ = deprecated.getter("regard.tasks.batch")
