"""Which keys each rank needs for its queries, and from whom: a pure function of the mask and the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.components.predicate import Mask
from regard.components.tile import Range, Sizes
from regard.distributed.layout import Ranges, grid_of, join


@dataclass(frozen=True)
class Needs:
    """The keys that ranks need.

    Args:
        of: for each rank, the ranges of keys that it needs.
        spans: for each rank and each range of its queries, the first and the last of the keys that these need; an empty
            range if they need none.
    """

    of: list[Ranges]
    spans: list[list[Range]]

    def span(self, rank: int) -> Range:
        """Return the first and the last of the keys that a rank needs."""
        parts = self.of[rank]
        return (parts[0][0], parts[-1][1]) if parts else (0, 0)

    def between(self, holder: Ranges, rank: int) -> Ranges:
        """Return the keys among the ranges of a holder that a rank needs."""
        found = [
            (max(a, c), min(b, d)) for a, b in holder for c, d in self.of[rank] if max(a, c) < min(b, d)
        ]  # fmt: skip
        return join(found)


def find_needs(mask: Mask | None, sizes: Sizes, queries: Sequence[Ranges], device: torch.device) -> Needs:
    """Return the keys that each rank needs.

    Args:
        mask: the mask of the whole problem; without one, each query needs all keys.
        sizes: the sizes of the whole problem.
        queries: the ranges of queries of each rank.
        device: the device of the tensors of the mask.

    >>> from regard.components.tile import Sizes
    >>> from regard.distributed.needs import find_needs
    >>> sizes = Sizes(1, 1, 1, 256, 256)
    >>> needs = find_needs(mask.window(left=10, right=0), sizes, [((0, 128),), ((128, 256),)], torch.device("cpu"))
    >>> needs.of  # to a tile of 64 positions
    [((0, 128),), ((64, 256),)]
    """
    if mask is None:
        every = ((0, sizes.S),) if sizes.S else ()
        return Needs(
            [every if parts else () for parts in queries], [[(0, sizes.S) for _ in parts] for parts in queries]
        )
    grid = grid_of(sizes, device)
    some = mask.coverage(grid)[0].any(0).expand(grid.first_query.shape[0], grid.first_key.shape[1]).cpu()
    of, spans = [], []
    for parts in queries:
        ranges = [
            _columns(some[first // grid.rows : -(-stop // grid.rows)].any(0), grid.columns, sizes.S)
            for first, stop in parts
        ]
        of.append(join([part for found in ranges for part in found]))
        spans.append([(found[0][0], found[-1][1]) if found else (0, 0) for found in ranges])
    return Needs(of, spans)


def _columns(needed: Tensor, width: int, length: int) -> Ranges:
    """Return the ranges of positions of the needed columns of tiles."""
    columns = needed.nonzero().flatten().tolist()
    return join([(n * width, min((n + 1) * width, length)) for n in columns])
