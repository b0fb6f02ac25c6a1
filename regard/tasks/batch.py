"""Sequences of different lengths, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.tasks.tokens import PAD


def deal(lengths: Sequence[int], budget: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """Deal examples into batches of similar lengths, of which each holds at most `budget` tokens, padding included.

    Args:
        lengths: the length of each example.
        budget: how many tokens a batch may hold; a longer example has a batch of its own.
        generator: shuffles the examples of one length, and the batches; without one they come by length.

    Returns:
        The numbers of the examples in each batch.
    """
    n = len(lengths)
    order = torch.randperm(n, generator=generator).tolist() if generator is not None else list(range(n))
    order.sort(key=lambda i: lengths[i])  # stable: examples of one length stay shuffled
    batches: list[list[int]] = []
    for i in order:
        # In order of length, so the last is the longest.
        if not batches or (len(batches[-1]) + 1) * lengths[i] > budget:
            batches.append([])
        batches[-1].append(i)
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of numbers as one tensor (B, S) filled up with `PAD`, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    out = torch.full((len(rows), int(lengths.max()) if len(rows) else 0), PAD)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out, lengths
