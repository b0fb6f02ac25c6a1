"""Tiles: boxes in the (batch, head, query, key) space that are computed in one step, and the grid of all tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]
# The position of the queries relative to the keys: "start", "end", or the key position of query 0; None if unspecified.
Align = str | int | None


@dataclass(frozen=True)
class Sizes:
    """The sizes of a problem: B batch, H query heads, G key/value heads, L queries, S keys."""

    B: int
    H: int
    G: int
    L: int
    S: int

    def offset(self, align: Align) -> int:
        """Return the key position of query 0: 0 for "start", S - L for "end", or the integer itself."""
        if align is None or isinstance(align, str):
            return self.S - self.L if align == "end" else 0
        return align


@dataclass(frozen=True)
class Box:
    """A part of a problem: half-open ranges of its batch rows, heads, queries and keys, and the sizes of the whole."""

    b: Range
    h: Range
    q: Range
    k: Range
    sizes: Sizes

    @property
    def origin(self) -> tuple[int, int, int, int]:
        """The first batch row, head, query and key."""
        return self.b[0], self.h[0], self.q[0], self.k[0]

    def offset(self, align: Align) -> int:
        """Return the key position of the first query of the part, counted from its first key."""
        return self.sizes.offset(align) + self.q[0] - self.k[0]

    def cut(self, tensor: Tensor) -> Tensor:
        """Return the view of this part on a tensor that broadcasts to (B, H, L, S)."""
        return cut(tensor, (self.b, self.h, self.q, self.k))


def cut(tensor: Tensor, ranges: Sequence[Range]) -> Tensor:
    """Return a range of each dimension of a tensor, but all of the dimensions of size 1."""
    return tensor[tuple([slice(*r) if n > 1 else slice(None) for r, n in zip(ranges, tensor.shape, strict=True)])]


@dataclass(frozen=True)
class Tile:
    """Half-open ranges of batch rows, heads, queries and keys, and the sizes of the problem.

    The range of heads consists of complete groups that share a key/value head, or lies within a group. `batch`, `head`,
    `query` and `key` are index tensors that broadcast to (b, h, l, s).
    """

    b: Range
    h: Range
    q: Range
    k: Range
    sizes: Sizes
    device: torch.device

    @property
    def g(self) -> Range:
        """The range of key/value heads of the tile."""
        repeats = max(self.sizes.H // max(self.sizes.G, 1), 1)
        return self.h[0] // repeats, -(-self.h[1] // repeats)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The numbers of batch rows, heads, queries and keys."""
        b, h, q, k = [stop - start for start, stop in (self.b, self.h, self.q, self.k)]
        return b, h, q, k

    @property
    def batch(self) -> Tensor:
        return torch.arange(*self.b, device=self.device).view(-1, 1, 1, 1)

    @property
    def head(self) -> Tensor:
        return torch.arange(*self.h, device=self.device).view(1, -1, 1, 1)

    @property
    def query(self) -> Tensor:
        return torch.arange(*self.q, device=self.device).view(1, 1, -1, 1)

    @property
    def key(self) -> Tensor:
        return torch.arange(*self.k, device=self.device).view(1, 1, 1, -1)

    def behind(self, align: Align) -> Tensor:
        """Return query position minus key position, (1, 1, l, s): positive for keys before the query."""
        return self.query + self.sizes.offset(align) - self.key

    def cut(self, tensor: Tensor) -> Tensor:
        """Return the view of this tile on a tensor that broadcasts to (B, H, L, S)."""
        return cut(tensor, (self.b, self.h, self.q, self.k))

    def within(self, box: Box) -> Tile:
        """Return the tile of the whole problem that this tile of a part is."""
        b, h, q, k = [
            (start + first, stop + first)
            for (start, stop), first in zip((self.b, self.h, self.q, self.k), box.origin, strict=True)
        ]
        return Tile(b, h, q, k, box.sizes, self.device)

    def cut_heads(self, tensor: Tensor) -> Tensor:
        """Return the elements of a tensor () or (H,) for the heads of this tile; they broadcast to (b, h, l, s)."""
        return tensor if tensor.dim() == 0 else tensor[slice(*self.h)].view(1, -1, 1, 1)


class IndexTile:
    """A tile of one batch row and head, given by index tensors (1, 1, l, s) of any values: what `Mask.allowed` and
    `Bias.bias` receive where a compiler records them.
    """

    def __init__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, sizes: Sizes) -> None:
        self.batch, self.head, self.query, self.key = batch, head, query, key
        self.sizes, self.device = sizes, query.device

    def __getattr__(self, name: str) -> None:
        raise AttributeError(
            f"attention: `tile.{name}` is unknown while a compiler records a mask or bias; expected batch, head, query, "
            "key, shape, sizes, behind, cut or cut_heads (backend='reference' compiles it, in memory L x S)"
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `Tile`."""
        return 1, 1, self.query.shape[2], self.key.shape[3]

    def within(self, box: Box) -> IndexTile:
        """See `Tile`."""
        b, h, q, k = box.origin
        return IndexTile(self.batch + b, self.head + h, self.query + q, self.key + k, box.sizes)

    def behind(self, align: Align) -> Tensor:
        """See `Tile`."""
        return self.query + self.sizes.offset(align) - self.key

    def cut(self, tensor: Tensor) -> Tensor:
        """See `Tile`."""
        indices = (self.batch, self.head, self.query, self.key)
        return tensor[tuple([i if n > 1 else torch.zeros_like(i) for i, n in zip(indices, tensor.shape, strict=True)])]

    def cut_heads(self, tensor: Tensor) -> Tensor:
        """See `Tile`."""
        return tensor if tensor.dim() == 0 else tensor[self.head]


@dataclass(frozen=True)
class Grid:
    """The edges of all tiles of a problem.

    Args:
        first_query, last_query: (R, 1), for each row of tiles. first_key, last_key: (1, C), for each column of tiles.
        sizes: the sizes of the problem. rows, columns: number of queries and keys per tile.
    """

    first_query: Tensor
    last_query: Tensor
    first_key: Tensor
    last_key: Tensor
    sizes: Sizes
    rows: int
    columns: int

    @staticmethod
    def of(sizes: Sizes, rows: int, columns: int, device: torch.device) -> Grid:
        """Return the grid of tiles of `rows` queries by `columns` keys."""
        q = torch.arange(0, sizes.L, rows, device=device).view(-1, 1)
        k = torch.arange(0, sizes.S, columns, device=device).view(1, -1)
        last_q, last_k = (q + rows - 1).clamp(max=sizes.L - 1), (k + columns - 1).clamp(max=sizes.S - 1)
        return Grid(q, last_q, k, last_k, sizes, rows, columns)


def concat_ranges(columns: Sequence[Range], part: Callable[[Range], Tensor]) -> Tensor:
    """Concatenate what `part` returns for each range of keys, along the last dimension."""
    parts = [part(keys) for keys in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
