"""A tile: the box of the (batch, head, query, key) space that one step computes; and the grid that all of them form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]
# Where the queries stand among the keys: "start", "end", or the key beside query 0; None where it was left out.
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
        """The key position that query 0 stands at: 0 for "start", S - L for "end", or the number given."""
        if isinstance(align, int):
            return align
        return self.S - self.L if align == "end" else 0


@dataclass(frozen=True)
class Tile:
    """Half-open ranges of batch rows, heads, queries and keys, and the sizes of the whole.

    The heads are whole groups that share a key/value head, or lie within one.
    `batch`, `head`, `query` and `key` are index tensors shaped to broadcast to (b, h, l, s).
    """

    b: Range
    h: Range
    q: Range
    k: Range
    sizes: Sizes
    device: torch.device

    @property
    def g(self) -> Range:
        """The key/value heads that the heads of the tile use."""
        repeats = max(self.sizes.H // max(self.sizes.G, 1), 1)
        return self.h[0] // repeats, -(-self.h[1] // repeats)

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
        """How far each key lies behind its query: positive in the past. Shape (1, 1, l, s)."""
        return self.query + self.sizes.offset(align) - self.key

    def cut(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that broadcasts to (B, H, L, S) which lies in this tile, as a view."""
        ranges = (self.b, self.h, self.q, self.k)
        return tensor[tuple([slice(*r) if n > 1 else slice(None) for r, n in zip(ranges, tensor.shape, strict=True)])]

    def cut_heads(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of shape () or (H,) which lies in this tile, shaped to broadcast to (b, h, l, s)."""
        return tensor if tensor.dim() == 0 else tensor[slice(*self.h)].view(1, -1, 1, 1)


@dataclass(frozen=True)
class Grid:
    """The edges of all tiles of a problem: the first and last query of each row of tiles, shape (R, 1), the first and
    last key of each column of tiles, shape (1, C), the sizes of the problem, and how many queries and keys a tile has.
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
        """The grid of tiles of `rows` queries by `columns` keys."""
        q = torch.arange(0, sizes.L, rows, device=device).view(-1, 1)
        k = torch.arange(0, sizes.S, columns, device=device).view(1, -1)
        last_q, last_k = (q + rows - 1).clamp(max=sizes.L - 1), (k + columns - 1).clamp(max=sizes.S - 1)
        return Grid(q, last_q, k, last_k, sizes, rows, columns)
