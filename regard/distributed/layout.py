"""Layouts: which positions of a sequence each rank of a group holds. Pure functions of length, number of ranks and mask."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from regard import check
from regard.components.predicate import Mask
from regard.components.tile import Grid, Range, Sizes

# The ranges of positions of one rank, in order.
Ranges = tuple[Range, ...]
LAYOUTS = ("even", "mirrored", "balanced")
# Chunks per rank that the balanced layout deals out, and the least number of positions of one.
_CHUNKS, _LEAST = 16, 16
# Tiles per axis of the grid on which work and needs are found; tiles have at least _TILE positions.
_GRID, _TILE = 1024, 64
# A layout with fewer chunks is preferred if its busiest rank has at most this times the work of the best one.
_TOLERANCE = 1.05


def ranges_of(layout: str, length: int, ranks: int, mask: Mask | None = None) -> list[Ranges]:
    """Return the ranges of positions of each rank. Each position belongs to one rank; ranks may be empty.

    Args:
        layout: "even": one range per rank, of equal lengths to within one. "mirrored": two ranges per rank, the r-th and the
            r-th from the end of 2 x ranks, which balances causal masks. "balanced": as many ranges as needed, so that ranks
            have about equal numbers of pairs that the mask allows.
        length: the number of positions.
        ranks: the number of ranks.
        mask: the mask of self-attention over the sequence, for "balanced"; without an alignment or with the one of L = S.

    >>> from regard.distributed.layout import ranges_of
    >>> ranges_of("even", 10, 3)
    [((0, 3),), ((3, 6),), ((6, 10),)]
    >>> ranges_of("mirrored", 12, 2)
    [((0, 3), (9, 12)), ((3, 6), (6, 9))]
    """
    if layout == "even":
        return [(part,) if part[0] < part[1] else () for part in _even(length, ranks)]
    if layout == "mirrored":
        parts = _even(length, 2 * ranks)
        pairs = [(parts[r], parts[2 * ranks - 1 - r]) for r in range(ranks)]
        return [tuple(part for part in pair if part[0] < part[1]) for pair in pairs]
    if layout == "balanced":
        return _balanced(length, ranks, mask)
    raise check.error("shards: layout", layout, " or ".join(map(repr, LAYOUTS)), True)


def best_layout(length: int, ranks: int, mask: Mask | None) -> str:
    """Return the layout with the fewest ranges whose busiest rank has at most 1.05 times the work of the best layout.

    >>> from regard.distributed.layout import best_layout
    >>> best_layout(4096, 4, None), best_layout(4096, 4, mask.causal())
    ('even', 'mirrored')
    """
    if mask is None or ranks == 1:
        return "even"
    shares = {layout: busiest(ranges_of(layout, length, ranks, mask), length, mask) for layout in LAYOUTS}
    best = min(shares.values())
    return next(layout for layout in LAYOUTS if shares[layout] <= _TOLERANCE * best)


def busiest(ranges: Sequence[Ranges], length: int, mask: Mask | None) -> float:
    """Return the work of the busiest rank relative to the mean: 1 is perfect balance.

    >>> from regard.distributed.layout import busiest, ranges_of
    >>> [round(busiest(ranges_of(layout, 8192, 8), 8192, mask.causal()), 2) for layout in ("even", "mirrored")]
    [1.87, 1.0]
    """
    total = _work(length, mask).cumsum(0)
    total = torch.cat([total.new_zeros(1), total])
    work = [sum(float(total[stop] - total[first]) for first, stop in parts) for parts in ranges]
    return max(work) * len(work) / sum(work) if sum(work) else 1.0


def grid_of(sizes: Sizes, device: torch.device) -> Grid:
    """Return the grid on which masks are asked for the tiles that contain pairs that may attend."""
    rows, columns = (max(_TILE, -(-n // _GRID)) for n in (sizes.L, sizes.S))
    return Grid.of(sizes, rows, columns, device)


def _even(length: int, parts: int) -> list[Range]:
    """Divide positions evenly, to within one."""
    edges = [length * n // parts for n in range(parts + 1)]
    return list(pairwise(edges))


def _work(length: int, mask: Mask | None) -> Tensor:
    """Return the number of keys that each query (length,) has in tiles with pairs that may attend; 1 at least, for the work
    that every query is. In tiles that are not full, half of the pairs are counted."""
    if mask is None:
        return torch.full((length,), float(max(length, 1)), dtype=torch.float64)
    sizes = Sizes(1, 1, 1, length, length)
    grid = grid_of(sizes, torch.device("cpu"))
    some, full = mask.coverage(grid)
    pairs = (some.double() + full.double()).mean(0) / 2 * (grid.last_key - grid.first_key + 1)
    return 1 + pairs.expand(grid.first_query.shape[0], -1).sum(1).repeat_interleave(grid.rows)[:length]


def _balanced(length: int, ranks: int, mask: Mask | None) -> list[Ranges]:
    """Deal chunks to the rank with the least work so far, the longest first; neighbors are joined."""
    width = max(_LEAST, -(-length // (_CHUNKS * ranks)))
    edges = [*range(0, length, width), length]
    total = torch.cat([torch.zeros(1, dtype=torch.float64), _work(length, mask).cumsum(0)])
    chunks = list(pairwise(edges))
    work = [float(total[stop] - total[first]) for first, stop in chunks]
    least = [(0.0, rank) for rank in range(ranks)]
    dealt: list[list[Range]] = [[] for _ in range(ranks)]
    for n in sorted(range(len(chunks)), key=lambda n: (-work[n], n)):
        done, rank = heapq.heappop(least)
        dealt[rank].append(chunks[n])
        heapq.heappush(least, (done + work[n], rank))
    return [join(parts) for parts in dealt]


def join(parts: Sequence[Range]) -> Ranges:
    """Sort ranges, and join those that touch or overlap.

    >>> from regard.distributed.layout import join
    >>> join([(4, 6), (0, 2), (2, 3), (5, 8)])
    ((0, 3), (4, 8))
    """
    joined: list[Range] = []
    for first, stop in sorted(parts):
        if first == stop:
            continue
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((first, stop))
    return tuple(joined)
