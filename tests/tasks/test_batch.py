"""Batches contain every example once, and keep to the budget of tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.batch import make_batches, pad
from regard.tasks.tokens import PAD


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200), st.integers(0, 9))
def test_make_batches_respects_budget(lengths: list[int], budget: int, seed: int) -> None:
    for generator in (None, torch.Generator().manual_seed(seed)):
        batches = make_batches(lengths, budget, generator)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            longest = max(lengths[i] for i in batch)
            assert longest * len(batch) <= budget or len(batch) == 1
    assert make_batches(lengths, budget, torch.Generator().manual_seed(seed)) == batches


def test_make_batches_shuffles_and_fills_batches() -> None:
    lengths = [5] * 100
    one, two = (make_batches(lengths, 50, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert one != two
    assert {len(batch) for batch in one} == {10}
    mixed = make_batches([1, 9] * 50, 90, torch.Generator().manual_seed(0))
    assert all(len({i % 2 for i in batch}) == 1 for batch in mixed if len(batch) > 10)


def test_pad_returns_rows_and_lengths() -> None:
    rows, lengths = pad([[3, 4, 5], [], [7]])
    assert rows.tolist() == [[3, 4, 5], [PAD] * 3, [7, PAD, PAD]]
    assert lengths.tolist() == [3, 0, 1]
    assert pad([])[0].shape == (0, 0)
