"""The largest scores of each row, kept while the tiles go by."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nothing(call, count: tl.constexpr):
    """Places for the largest scores (rows, wide_top) and their keys; those beyond `top` are never taken."""
    place = tl.arange(0, call.form.wide_top)[None, :] + tl.zeros([count, 1], tl.int32)
    best = tl.where(place < call.form.top, -float("inf"), float("inf"))
    return best, tl.full([count, call.form.wide_top], -1, tl.int32)


@triton.jit
def take(best, found, s, first, width: tl.constexpr):
    """Put the largest scores of a tile in the places of smaller ones. A row gives up one score a round, and most tiles have
    nothing to give: rounds end when no row has.
    """
    column = tl.arange(0, width)[None, :]
    place = tl.arange(0, best.shape[1])[None, :]
    largest, at = tl.max(s, 1, return_indices=True)
    least, slot = tl.min(best, 1, return_indices=True)
    takes = largest > least
    while tl.max(takes.to(tl.int32), 0) > 0:
        here = takes[:, None] & (place == slot[:, None])
        best = tl.where(here, largest[:, None], best)
        found = tl.where(here, first + at[:, None], found)
        s = tl.where(takes[:, None] & (column == at[:, None]), -float("inf"), s)
        largest, at = tl.max(s, 1, return_indices=True)
        least, slot = tl.min(best, 1, return_indices=True)
        takes = largest > least
    return best, found


@triton.jit
def largest_first(best, found, n, top: tl.constexpr):
    """The next largest score of each row and its key, and what is left without it."""
    place = tl.arange(0, best.shape[1])[None, :]
    left = tl.where(place < top, best, -float("inf"))
    if n == 0:
        best = left
    value, at = tl.max(best, 1, return_indices=True)
    here = place == at[:, None]
    key = tl.sum(tl.where(here, found, 0), 1)
    return value, key, tl.where(here, -float("inf"), best)
