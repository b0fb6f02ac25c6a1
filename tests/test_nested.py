"""Padding of nested tensors."""

from __future__ import annotations

import torch

import regard
from regard import nested


def test_length_mask_and_unsupported_ragged_dimension() -> None:
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8)
    mask = nested.length_mask(torch.tensor([5, 2]), torch.tensor([4, 6]), 5, 6)
    full = regard.attention(q, k, k, mask=mask, summary=regard.Summary(full=True))[1].full
    assert full is not None
    allowed = (full > 0).any(1)
    assert bool(allowed[0, :, :4].all()) and not bool(allowed[0, :, 4:].any())
    assert bool(allowed[1, :2].all()) and not bool(allowed[1, 2:].any())
    sequences = [torch.randn(n, 3, 8) for n in (2, 4)]
    assert nested.to_padded(torch.nested.nested_tensor(sequences)) is None, (
        "another dimension than the length is ragged"
    )
    padded, lengths = nested.to_padded(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(0, 3)])) or (None, None)
    assert padded is not None and padded.tolist() == [[[1.0] * 3] * 2, [[0.0] * 3] * 2]
    assert lengths is not None and lengths.tolist() == [2, 0]
