"""The largest scores of each row, maintained in registers over the tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def init(args, count: tl.constexpr):
    """Empty slots for the largest scores (rows, top_padded) and their keys. Slots beyond `top` are never filled."""
    slot = tl.arange(0, args.config.top_padded)[None, :] + tl.zeros([count, 1], tl.int32)
    best = tl.where(slot < args.config.top, -float("inf"), float("inf"))
    return best, tl.full([count, args.config.top_padded], -1, tl.int32)


@triton.jit
def update(best, keys, s, first_key, width: tl.constexpr):
    """Replace the smallest of the best scores by larger ones of a tile.

    Each round moves at most one score per row. Most tiles have none to move: the rounds end when no row has one left.
    """
    column = tl.arange(0, width)[None, :]
    slots = tl.arange(0, best.shape[1])[None, :]
    largest, at = tl.max(s, 1, return_indices=True)
    smallest, slot = tl.min(best, 1, return_indices=True)
    moves = largest > smallest
    while tl.max(moves.to(tl.int32), 0) > 0:
        here = moves[:, None] & (slots == slot[:, None])
        best = tl.where(here, largest[:, None], best)
        keys = tl.where(here, first_key + at[:, None], keys)
        s = tl.where(moves[:, None] & (column == at[:, None]), -float("inf"), s)
        largest, at = tl.max(s, 1, return_indices=True)
        smallest, slot = tl.min(best, 1, return_indices=True)
        moves = largest > smallest
    return best, keys


@triton.jit
def pop_largest(best, keys, n, top: tl.constexpr):
    """The n-th largest score of each row and its key, and the scores without it. Call with n = 0, 1, ... in order."""
    slots = tl.arange(0, best.shape[1])[None, :]
    filled = tl.where(slots < top, best, -float("inf"))
    if n == 0:
        best = filled
    value, at = tl.max(best, 1, return_indices=True)
    here = slots == at[:, None]
    key = tl.sum(tl.where(here, keys, 0), 1)
    return value, key, tl.where(here, -float("inf"), best)
